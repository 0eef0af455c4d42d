"""Penalties on embeddings, logits and routers; the rows of a matrix are samples, or tokens."""

import references as ref
import restrain as rs
from cases.case import Case

PENALTIES = {
    "Variance": [
        Case(rs.Variance(), ref.variance, zero_at_zero=False, any_rank=False, domain=lambda w: w * 0.2),
        Case(rs.Variance(9.0, 0.1), lambda x: ref.variance(x, 9.0, 0.1), zero_at_zero=False, any_rank=False),
    ],
    "Covariance": [Case(rs.Covariance(), ref.covariance, any_rank=False)],
    "SIGReg": [
        Case(rs.SIGReg(32), ref.sigreg(32), complex=False, zero_at_zero=False),
        Case(rs.SIGReg(8, seed=3), ref.sigreg(8, 3), complex=False, zero_at_zero=False),
    ],
    "ZLoss": [Case(rs.ZLoss(), ref.z_loss, complex=False, zero_at_zero=False)],
    "LoadBalance": [
        Case(rs.LoadBalance(1), ref.load_balance(1), complex=False, zero_at_zero=False, any_rank=False),
        Case(
            rs.LoadBalance(1, scores="sigmoid"),
            ref.load_balance(1, "sigmoid"),
            complex=False,
            zero_at_zero=False,
            any_rank=False,
        ),
    ],
}
