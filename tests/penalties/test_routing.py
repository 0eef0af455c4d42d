"""Balance of experts: values at the ends, sequences, accumulated counts, masks, and what is refused."""

import numpy as np
import pytest
import torch

import references as ref
import restrain as rs
from restrain.errors import PenaltyError, SelectionError
from routers import fresh


def logits(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_one_at_balance_and_experts_over_k_at_collapse(k, scores):
    penalty, experts = rs.LoadBalance(k, scores=scores), 6
    rolled = torch.stack(
        [torch.cat([torch.full((k,), 9.0), torch.full((experts - k,), -40.0)]).roll(i) for i in range(experts)]
    )
    torch.testing.assert_close(penalty(rolled), torch.tensor(1.0))
    torch.testing.assert_close(penalty(rolled[:1].expand(5, -1)), torch.tensor(experts / k))
    torch.testing.assert_close(penalty(torch.zeros(4, experts)), torch.tensor(1.0))
    z = logits(7, experts)
    np.testing.assert_allclose(penalty(z), ref.load_balance(k, scores)(z.numpy()), rtol=1e-13)
    assert abs(penalty(z) - ref.load_balance(k % 3 + 1, scores)(z.numpy())) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sigmoid_routers_have_no_epsilon(dtype):
    """With s / (Σ s + 1e-9) all of it is lost where every score is small, and 0 / 0 in half precision without."""
    z = torch.tensor([[-60.0, -62.0, -64.0], [-62.0, -60.0, -64.0]], dtype=dtype, requires_grad=True)
    value = rs.LoadBalance(1, scores="sigmoid")(z)
    torch.testing.assert_close(value, rs.LoadBalance(1)(z.detach().float()))  # sigmoid is exp there
    value.backward()
    assert z.grad.isfinite().all()
    assert z.grad.abs().max() > 1e-3
    naive = z.detach().float().sigmoid() / (z.detach().float().sigmoid().sum(-1, keepdim=True) + 1e-9)
    assert naive.sum() < 1e-6


def test_of_sequences():
    z, lengths = logits(3, 5, 4), [5, 2, 0]
    penalty = rs.LoadBalance(2, "sequence")
    wanted = [ref.load_balance(2)(one.numpy()) for one in z]
    torch.testing.assert_close(penalty(z), torch.tensor(np.mean(wanted)))
    torch.testing.assert_close(penalty.over_batch(z.transpose(0, 1), 1), torch.tensor(np.mean(wanted)))
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    wanted = [ref.load_balance(2)(one[:length].numpy()) for one, length in zip(z, lengths, strict=True) if length]
    torch.testing.assert_close(penalty.over_batch(z, 0, mask[:, :, None]), torch.tensor(np.mean(wanted)))
    kept = rs.LoadBalance(2).over_batch(z, 0, mask[:, :, None])
    torch.testing.assert_close(kept, rs.LoadBalance(2)(z[mask]))
    assert abs(kept - np.mean(wanted)) > 1e-3
    with pytest.raises(PenaltyError, match=r"unflatten\(0"):
        penalty(z.flatten(0, 1))


def counted(z, k=2):
    return torch.zeros_like(z).scatter(-1, z.topk(k, -1).indices, 1).sum(0)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_counts_of_the_update_so_far(reentrant, backend):
    if backend and reentrant is not None:
        pytest.skip("a compiled checkpoint can't make the tensors of counts")
    model, twin = fresh(reentrant), fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    reg = rs.attach(model, rs.LoadBalance(2, "batch").on(rs.outputs("router")), optimizer)
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    for step in range(3):
        so_far, seen = 0, 0
        for part in range(3):
            x = logits(8, 4, seed=10 * step + part).requires_grad_()
            loss = reg.loss(0 * run(x).sum()) / 3
            loss.backward()
            z = twin(x.detach())
            so_far, seen = so_far + counted(z.detach()), seen + 16
            wanted = 6 * (so_far / seen * z.softmax(-1).mean(0)).sum() / 3
            wanted.backward()
            torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    torch.compiler.reset()


def test_counts_that_a_checkpoint_cannot_know_are_refused():
    model = fresh(False)
    reg = rs.attach(
        model, rs.LoadBalance(2, "batch").on(rs.outputs("router")), torch.optim.SGD(model.parameters(), 0.1)
    )
    losses = [reg.loss(0 * model(logits(8, 4, seed=part)).sum()) for part in range(2)]
    with pytest.raises(PenaltyError, match="isn't the last one"):
        losses[0].backward()


def test_a_forward_that_is_thrown_away_counts_until_the_step():
    model, twin = fresh(), fresh()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = rs.attach(model, rs.LoadBalance(2, "batch").on(rs.outputs("router")), optimizer)
    thrown, x = logits(8, 4, seed=5), logits(8, 4, seed=6)
    model(thrown)
    z = twin(x)
    so_far = counted(twin(thrown).detach()) + counted(z.detach())
    loss = reg.loss(0 * model(x).sum())
    torch.testing.assert_close(loss, 6 * (so_far / 32 * z.softmax(-1).mean(0)).sum())
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(reg.loss(0 * model(x).sum()), rs.LoadBalance(2)(model(x)))


def test_evaluation_counts_nothing():
    model = fresh()
    reg = rs.attach(
        model, rs.LoadBalance(2, "batch").on(rs.outputs("router"), name="lb"), torch.optim.SGD(model.parameters(), 0.1)
    )
    x = logits(8, 4)
    with reg.evaluating() as evaluation, torch.no_grad():
        model.eval()(logits(8, 4, seed=3))
        evaluation.values()
    model.train()
    torch.testing.assert_close(reg.loss(0 * model(x).sum()), rs.LoadBalance(2)(model(x)))


def test_refusals():
    with pytest.raises(PenaltyError, match="value would be constant"):
        rs.LoadBalance(4)(logits(3, 4))
    with pytest.raises(PenaltyError, match=r"\(tokens, experts\)"):
        rs.LoadBalance(1)(logits(3))
    for bad in (0, 1.0, True, "2"):
        with pytest.raises(PenaltyError, match="top_k="):
            rs.LoadBalance(bad)
    with pytest.raises(PenaltyError, match="'micro-batch', 'batch', 'sequence'; got 'global'"):
        rs.LoadBalance(2, "global")
    with pytest.raises(PenaltyError, match="'softmax', 'sigmoid'"):
        rs.LoadBalance(2, scores="relu")
    with pytest.raises(PenaltyError, match="all experts of a token"):
        rs.LoadBalance(1).over_batch(logits(3, 4), 0, torch.ones(3, 4, dtype=torch.bool))
    model = fresh()
    reg = rs.attach(model, rs.LoadBalance(2).on(rs.outputs("router", via=lambda z: z.softmax(-1))))
    with pytest.raises(PenaltyError, match="got probabilities"):
        model(logits(8, 4))
    reg.detach()


def test_counts_of_an_update_are_refused_under_vmap():
    model = fresh()
    reg = rs.attach(model, rs.LoadBalance(2, statistics="batch").on(rs.outputs("router")))
    weights, x = {name: p.detach() for name, p in model.named_parameters()}, logits(5, 2, 4)
    of_one = torch.func.grad(lambda w, one: reg.loss(torch.func.functional_call(model, w, (one,)).sum()))
    with pytest.raises(PenaltyError, match="counts of its own"):
        torch.func.vmap(of_one, (None, 0))(weights, x)
    of_one(weights, x[0])  # grad alone has a batch


def test_attention_entropy():
    weights = logits(2, 3, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf).softmax(-1)
    entropy = torch.distributions.Categorical(probs=weights).entropy()
    torch.testing.assert_close(rs.AttentionEntropy(1.0).over_batch(weights, 0), (1 - entropy).clamp_min(0).mean())
    weights[1, :, 2:] = 0  # queries of padding
    kept = torch.cat([entropy[0].flatten(), entropy[1, :, :2].flatten()])
    torch.testing.assert_close(rs.AttentionEntropy(1.0)(weights), (1 - kept).clamp_min(0).mean())
    with pytest.raises(PenaltyError, match=r"sums to 1\.25.*after dropout"):
        rs.AttentionEntropy(1.0)(torch.tensor([[1.25, 0.0], [0.5, 0.5]]))
    p = logits(5, 4).softmax(-1).requires_grad_()
    np.testing.assert_allclose(rs.AttentionEntropy(1.2)(p).detach(), ref.attention_entropy(1.2)(p.detach().numpy()))
    assert abs(rs.AttentionEntropy(1.2)(p).item() - ref.attention_entropy(1.25)(p.detach().numpy())) > 1e-3
    assert torch.autograd.gradcheck(rs.AttentionEntropy(1.2), p)
    with pytest.raises(SelectionError, match="of attention weights"):
        rs.AttentionEntropy(1.0).on("*")
    one_hot = torch.eye(3, requires_grad=True)
    rs.AttentionEntropy(1.0)(one_hot).backward()
    assert one_hot.grad.isfinite().all()


def test_z_loss_of_sequences_with_padding_and_of_channels():
    z, mask = logits(3, 5, 4), torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    torch.testing.assert_close(rs.ZLoss().over_batch(z, 0, mask[:, :, None]), z[mask].logsumexp(-1).square().mean())
    torch.testing.assert_close(rs.ZLoss().over_batch(z.transpose(0, 1), 1), z.logsumexp(-1).square().mean())
    images = logits(2, 3, 4, 5)
    torch.testing.assert_close(rs.ZLoss(dim=1).over_batch(images, 0), images.logsumexp(1).square().mean())
    with pytest.raises(PenaltyError, match="dim=1"):
        rs.ZLoss().over_batch(images, 0)
    assert rs.ZLoss()(torch.full((2, 3), 1e4, dtype=torch.float16)).isfinite()
