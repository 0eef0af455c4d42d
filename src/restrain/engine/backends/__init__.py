"""How operations and instructions are computed: loops of C, kernels of inductor, eager torch, the formulas themselves."""
