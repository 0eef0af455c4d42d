"""Tokens a second of training a sparse autoencoder, beside SAELens and dictionary-learning.

    pip install sae-lens dictionary-learning
    python benchmarks/sae.py

TopK autoencoders of equal weights, data, learning rate and L0 = 32, with Adam, gradients clipped to a norm of 1, counts
of dead features and the auxiliary loss for them; 4,096 features of inputs with 512 dimensions, in batches of 2,048.
SAELens divides by the decoder's norms (its default), the others hold them at 1 and take the gradient's parallel part
away. The libraries' own steps are called: `SAETrainer.step`, `TopKTrainer.update`. Rounds of the libraries take turns;
data are made outside the time. The error is that on fresh data, as a part of the variance, after all rounds.
"""

import types
import warnings

import measure
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs

K, LR = 32, 1e-3


class Data:
    """Sums of about 30 of 2 n directions, with coefficients between a half and one and a half."""

    def __init__(self, width, features):
        generator = torch.Generator().manual_seed(0)
        self.directions = F.normalize(torch.randn(2 * features, width, generator=generator), dim=1)

    def batch(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        active = torch.rand(size, len(self.directions), generator=generator) < 30 / len(self.directions)
        return (active * (0.5 + torch.rand(size, len(self.directions), generator=generator))) @ self.directions


def initial(width, features):
    """Unit decoder rows, (features, width); the encoder is the same."""
    return F.normalize(torch.randn(features, width, generator=torch.Generator().manual_seed(1)), dim=1)


class Sae(nn.Module):
    def __init__(self, rows):
        super().__init__()
        features, width = rows.shape
        self.encoder, self.relu = nn.Linear(width, features), nn.ReLU()
        self.decoder, self.bias = nn.Linear(features, width, bias=False), nn.Parameter(torch.zeros(width))
        with torch.no_grad():
            self.encoder.weight.copy_(rows)
            self.encoder.bias.zero_()
            self.decoder.weight.copy_(rows.T)

    def forward(self, x):
        return self.decoder(self.relu(self.encoder(x - self.bias))) + self.bias


class Restrain:
    name = "restrain"

    def __init__(self, rows, batch):
        self.sae, code = Sae(rows), rs.outputs("relu")
        optimizer = self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=LR)
        aux = 1 / 32 * rs.AuxK(rows.shape[1] // 2, dead_after=1000 * batch)
        plan = [rs.TopK(K).on(code), aux.on(code), rs.UnitNorm("in").on("decoder.weight")]
        self.reg = rs.attach(self.sae, plan, optimizer)

    def step(self, x):
        loss = self.reg.loss((self.sae(x) - x).square().sum(1).mean())
        loss.backward()
        nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def reconstruct(self, x):
        with rs.recording(self.sae.eval(), rs.inputs("decoder")) as seen:
            return self.sae(x), seen["decoder:inputs"]


class SaeLens:
    name = "sae-lens"

    def __init__(self, rows, batch):
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        features, width = rows.shape
        config = TopKTrainingSAEConfig(d_in=width, d_sae=features, k=K)
        self.sae = TopKTrainingSAE(config)
        with torch.no_grad():
            self.sae.W_dec.copy_(rows)
            self.sae.W_enc.copy_(rows.T)
            self.sae.b_enc.zero_()
        trainer = SAETrainerConfig(10**9, train_batch_size_samples=batch, lr=LR, lr_end=LR)
        self.trainer = SAETrainer(cfg=trainer, sae=self.sae, data_provider=iter(()))

    def step(self, x):
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x):
        code = self.sae.encode(x)
        return self.sae.decode(code), code.to_dense()


class DictionaryLearning:
    name = "dictionary-learning"

    def __init__(self, rows, batch):
        from dictionary_learning.trainers.top_k import TopKTrainer

        features, width = rows.shape
        self.trainer = TopKTrainer(
            10**9, width, features, K, 0, "none", lr=LR, warmup_steps=0, device="cpu", threshold_start_step=0
        )
        self.trainer.dead_feature_threshold = 1000 * batch
        self.steps = 1  # of step 0 it makes a geometric median
        with torch.no_grad():
            self.trainer.ae.encoder.weight.copy_(rows)
            self.trainer.ae.encoder.bias.zero_()
            self.trainer.ae.decoder.weight.copy_(rows.T)

    def step(self, x):
        self.trainer.update(self.steps, x)
        self.steps += 1

    def reconstruct(self, x):
        return self.trainer.ae(x, output_features=True)


LIBRARIES = (Restrain, SaeLens, DictionaryLearning)


def made(rows, batch):
    """{name: autoencoder in training}, and {name: why not} of what isn't installed."""
    found, missing = {}, {}
    for library in LIBRARIES:
        try:
            found[library.name] = library(rows, batch)
        except ImportError as error:
            missing[library.name] = f"not installed: {error}"
    return found, missing


@torch.no_grad()
def quality(one, x):
    """L0 and error on fresh data."""
    out, code = one.reconstruct(x)
    error = (out - x).square().sum() / (x - x.mean(0)).square().sum()
    return (code != 0).sum(1).float().mean().item(), error.item()


def main():
    options = measure.options(
        __doc__, ("--rounds", {"type": int, "default": 12}), ("--steps", {"type": int, "default": 5})
    )
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    width, features, batch = (64, 256, 128) if options.quick else (512, 4096, 2048)
    data, rows = Data(width, features), initial(width, features)
    found, missing = made(rows, batch)
    state = types.SimpleNamespace(round=dict.fromkeys(found, 0), batches=[])

    def before(name):
        state.batches = [data.batch(batch, 1000 * state.round[name] + step) for step in range(options.steps)]
        state.round[name] += 1

    def job(name):
        for x in state.batches:
            found[name].step(x)

    seconds = measure.paired({name: lambda name=name: job(name) for name in found}, options.rounds, before=before)
    fresh = data.batch(batch, 10**6)
    section = measure.Section(__file__, "Sparse autoencoders", __doc__)
    lines = []
    for name, one in found.items():
        rates = [options.steps * batch / taken for taken in seconds[name]]
        l0, error = quality(one, fresh)
        slower = measure.times(measure.ratios(seconds, name, "restrain"))
        lines.append([name, measure.spread(rates), slower, f"{l0:.1f}", f"{error:.4f}"])
    lines += [[name, why, "", "", ""] for name, why in missing.items()]
    columns = ["library", "tokens/s: median (quartiles)", "time / restrain's", "L0", "error / variance"]
    section.table("TopK autoencoders", columns, lines)
    section.finish(options.out, options.quick)


if __name__ == "__main__":
    main()
