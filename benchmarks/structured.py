"""What the proxes of structured penalties cost: CPU seconds of one thread, the least of some rounds.

python benchmarks/structured.py [--rounds 5]
"""

import argparse
import time

import torch

import restrain as rs

LISTS = {"in": [list(range(0, 300)), list(range(300, 310)), list(range(310, 1000))]}
MEMBERS = {
    "GroupLasso()": rs.GroupLasso(),
    "GroupLasso(lists)": rs.GroupLasso(LISTS),
    "SparseGroupLasso(0.1, 0.1)": rs.SparseGroupLasso(0.1, 0.1),
    "GroupLInf()": rs.GroupLInf(),
    "GroupLInf((4, 4))": rs.GroupLInf((4, 4)),
    "ExclusiveLasso()": rs.ExclusiveLasso(),
    "SLOPE(q=0.1)": rs.SLOPE(q=0.1),
    "TotalVariation()": rs.TotalVariation(),
    "FusedLasso(0.1, 1.0)": rs.FusedLasso(0.1, 1.0),
}


def seconds(job, rounds):
    """The least CPU time of a job."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        job()
        times.append(time.process_time() - start)
    return min(times)


def main():
    """Print a table: one step for all entries, and one for each where the member takes that."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    w, steps = torch.randn(1000, 1000), torch.rand(1000, 1000)
    print(f"{'prox of 1000 x 1000 entries':32} one step   by entry")
    for name, member in MEMBERS.items():
        by_entry = f"{seconds(lambda m=member: m.prox(w, steps), rounds):7.3f} s" if member.groupwise else "      -"
        print(f"{name:32} {seconds(lambda m=member: m.prox(w, 0.3), rounds):7.3f} s {by_entry}")


if __name__ == "__main__":
    main()
