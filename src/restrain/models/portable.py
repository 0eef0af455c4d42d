"""A fitted model as one module: raw inputs → scaling → network → link → predictions."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restrain.errors import FileError, MissingExtraError
from restrain.models.layers import Network
from restrain.models.losses import Loss
from restrain.transforms.normalization import Standardize


class Portable(nn.Module):
    """The numbers of a model's `predict`, or of a classifier's `predict_proba`, from raw inputs.

    Args:
        network: copied, in evaluation mode.
        inputs, targets: what scales them, or None.
        loss: its inverse link is applied; None for logits.
        flat: drop the last axis of size 1.
    """

    def __init__(
        self, network: Network, inputs: Standardize | None, targets: Standardize | None, loss: Loss | None, flat: bool
    ) -> None:
        super().__init__()
        self.input_mean: Tensor | None
        self.input_std: Tensor | None
        self.target_mean: Tensor | None
        self.target_std: Tensor | None
        self.network, self.loss, self.flat = copy.deepcopy(network).eval(), loss, flat
        for name, scale in (("input", inputs), ("target", targets)):
            self.register_buffer(f"{name}_mean", None if scale is None else scale.mean.clone())
            self.register_buffer(f"{name}_std", None if scale is None else scale.deviation.clone())
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        x = x if self.network.shape_of_images is None else x.flatten(1)
        if self.input_mean is not None and self.input_std is not None:
            x = (x.double() - self.input_mean) / self.input_std
        output: Tensor = self.network(x.to(dtype))
        output = output if self.loss is None else self.loss.mean(output)
        if self.target_mean is not None and self.target_std is not None:
            output = (output * self.target_std + self.target_mean).to(dtype)
        return output[..., 0] if self.flat else output


def to_onnx(module: Portable, path: str | os.PathLike[str], shape: tuple[int, ...]) -> Path:
    """Write the module as ONNX, with the input "x" and the output "prediction"; return the path.

    Args:
        module: the module.
        path: the file.
        shape: of one sample. The number of samples is free.

    Raises:
        MissingExtraError: onnx or onnxscript isn't installed.
        FileError: the file can't be written.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("to_onnx needs onnx and onnxscript: pip install onnx onnxscript") from error
    dtype = next(module.network.parameters()).dtype
    example: Any = (torch.zeros(2, *shape, dtype=dtype, device="cpu"),)
    program = torch.onnx.export(
        module,
        example,
        input_names=["x"],
        output_names=["prediction"],
        dynamic_shapes=({0: torch.export.Dim("samples")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    try:
        program.save(os.fspath(path))
    except OSError as error:
        raise FileError(f"{path} can't be written: {error}") from error
    return Path(path)
