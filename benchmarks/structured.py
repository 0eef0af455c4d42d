"""What the proxes of structured penalties cost: CPU seconds of one thread, the least of some rounds.

python benchmarks/structured.py [--rounds 3] [--quick] [--out folder]
"""

import time

import torch
from measure import Section, digits, options

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
QUICK = {name: member for name, member in MEMBERS.items() if "lists" not in name}  # their indices need 1,000 columns


def seconds(job, rounds):
    """The least CPU time of a job."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        job()
        times.append(time.process_time() - start)
    return min(times)


def main():
    given = options(__doc__, ("--rounds", {"type": int, "default": 3}))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    section = Section(
        __file__, "Proxes of structured penalties", "CPU seconds of one thread, the least of some rounds."
    )
    size = 1000 if not given.quick else 100
    w, steps, rounds = torch.randn(size, size), torch.rand(size, size), 1 if given.quick else given.rounds
    rows = []
    for name, member in (QUICK if given.quick else MEMBERS).items():
        by_entry = digits(seconds(lambda m=member: m.prox(w, steps), rounds)) if member.groupwise else ""
        rows.append([f"`{name}`", digits(seconds(lambda m=member: m.prox(w, 0.3), rounds)), by_entry])
    section.table(f"Prox of {size:,} × {size:,} entries", ["penalty", "one step, s", "a step by entry, s"], rows)
    section.finish(given.out, given.quick)


if __name__ == "__main__":
    main()
