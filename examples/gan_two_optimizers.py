"""Two networks, two optimizers, two attachments: a GAN on a ring of points.

    pip install restrain
    python examples/gan_two_optimizers.py

The critic is kept flat at the real and the generated points (R1 and R2 of Mescheder et al. 2018);
the generator's weights decay at its own optimizer's step. The critic also runs in the generator's
step; its rules take no notice.
"""

import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs


def ring(count):
    angle = torch.rand(count, 1) * 2 * torch.pi
    return 2 * torch.cat([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)


def network(inputs, outputs):
    hidden = [nn.Linear(64, 64), nn.LeakyReLU(0.2)]
    return nn.Sequential(nn.Linear(inputs, 64), nn.LeakyReLU(0.2), *hidden, nn.Linear(64, outputs))


def main():
    torch.manual_seed(0)
    generator, critic = network(8, 2), network(2, 1)
    for_generator = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for_critic = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    flat = rs.attach(critic, 0.2 * rs.GradientPenalty().on(rs.outputs("4"), name="slope"), for_critic)
    small = rs.attach(generator, 1e-4 * rs.L2().on("*.weight", how="decoupled", name="decay"), for_generator)
    for step in range(1001):
        real, fake = ring(128), generator(torch.randn(128, 8))
        loss = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
        for_critic.zero_grad()
        flat.loss(loss).backward()
        for_critic.step()
        loss = F.softplus(-critic(fake)).mean()
        for_generator.zero_grad()
        small.loss(loss).backward()
        for_generator.step()
        if step % 250 == 0:
            print(f"step {step}: slope {flat.values()['slope']:.4f}, decay {small.values()['decay']:.4f}")
    with torch.no_grad():
        points = generator(torch.randn(2000, 8))
        radius = points.norm(dim=1)
        quarters = torch.stack([(points[:, 0] > 0) == a for a in (True, False)])
        share = min(float((q & ((points[:, 1] > 0) == b)).float().mean()) for q in quarters for b in (True, False))
    print(f"radius of generated points: {float(radius.mean()):.2f} ± {float(radius.std()):.2f} (the ring's is 2)")
    print(f"the emptiest quarter has {share:.2f} of them")


if __name__ == "__main__":
    main()
