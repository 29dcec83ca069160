"""Stage 2: turn the stage-1 denoiser into a one-step generator, by a learned log density ratio.

DiffRatio: Training One-Step Diffusion Models Without Teacher Supervision, arXiv 2502.08005. The
generator is G(z) = D(t_init z; t_init), a copy of the stage-1 network at one noise level. A ratio
network learns to tell noised data from noised samples; its logit h estimates log(p_sigma/q_sigma).
The generator minimises a divergence between q and p, whose gradient is computed from h. There is
no teacher.

Reads a data set and the network of stage 1 (`--init`: a network.pt of pretrain.py or a published
EDM or EDM2 pickle). Writes into --outdir network.pt (the averaged generator), ratio.pt, a
checkpoint, a log and sample grids. The same command again resumes the run.

    python train_diffratio.py                                  after python pretrain.py
    torchrun train_diffratio.py --divergence dijs              or dikl, dirm, fkl
    torchrun --nproc-per-node 8 train_diffratio.py --preset cifar10
"""

import machinery  # before PyTorch: how its threads wait
import copy
import dataclasses
import functools
import math

import torch
import torch.nn.functional as F

import fid
import networks
import pretrain
import sample
from machinery import checkpoints, data, training
from machinery.training import finite, fraction, not_negative, share

# ---- The method (docs/method.md). h = log(p_sigma/q_sigma), data over generator

# The gradient of D_f(q || p) = E_p[f(u)], u = q / p, is that of E_q[f'(u(x))] with the function u
# held fixed: it flows through x alone. Each line is f'(u) at u = exp(-h), up to a constant.
DIVERGENCES = {
    "dijs": lambda h: -0.5 * F.softplus(h),  # Jensen-Shannon, f = (u ln u - (u+1) ln((u+1)/2)) / 2
    "dikl": lambda h: -h,  # reverse Kullback-Leibler, f = u ln u
    "dirm": lambda h: F.softplus(-h),  # realism maximisation, f = (1 + u) ln(1 + u) - u
    "fkl": lambda h: -torch.exp(h),  # forward Kullback-Leibler, f = -ln u
}


def noise_levels(args, rt):
    """Noise levels sigma [N] of both networks; rt.randn() and rt.rand() are [N], too."""
    if args.noise == "karras":  # uniform in the index of EDM's schedule (Equation 5), as SiD
        return sample.karras_sigma(rt.rand() * args.karras_share)
    return (rt.randn() * args.p_std + args.p_mean).exp()  # ln sigma normal, as EDM (Table 1)


# Weight of the generator's loss at each noise level. Unweighted, small noise decides. "edm" stands
# in for the weight of SiD and DMD (docs/large-scale.md).
NOISE_WEIGHTS = {
    "none": lambda sigma: torch.ones_like(sigma),
    "sigma": lambda sigma: sigma,
    "sigma2": lambda sigma: sigma**2,
    "edm": lambda sigma: sigma**2 / networks.preconditioning("edm", sigma, 0.5)[1],
}


def ratio_loss(ratio, real, fake, sigma, eps_real, eps_fake, labels=None):
    """Binary cross-entropy on noised data (label 1) and noised samples (label 0), per pair [N].

    real, fake, eps_* [N, C, H, W]; sigma [N], the same for both. Returns the loss and the logits
    [N] of real and of fake. At h = 0 the loss is ln 2.
    """
    s = sigma[:, None, None, None]
    both = torch.cat([real + s * eps_real, fake + s * eps_fake])
    h = ratio(both, sigma.repeat(2), None if labels is None else labels.repeat(2))
    h_real, h_fake = h.chunk(2)
    return 0.5 * (F.softplus(-h_real) + F.softplus(h_fake)), h_real, h_fake


def generator_loss(ratio, fake, sigma, eps, divergence, labels=None):
    """The divergence's loss per image [N]; its gradient flows through x = fake + sigma eps."""
    x = fake + sigma[:, None, None, None] * eps
    return DIVERGENCES[divergence](ratio(x, sigma, labels))


def learning_rate_factor(args, nimg):
    """Cosine decay from 1 to 0 over --lr-decay-kimg; 0: constant; None: over the whole run."""
    kimg = args.kimg if args.lr_decay_kimg is None else args.lr_decay_kimg
    return 0.5 + 0.5 * math.cos(math.pi * min(nimg / (kimg * 1000), 1)) if kimg else 1.0


# ---- Settings: {flag: (default, help[, type or choices])}, and the presets' own

SETTINGS = dict(
    divergence=("dijs", "what the generator minimises", list(DIVERGENCES)),
    init=(None, "stage-1 network; None: runs/PRESET/pretrain/network.pt", str),
    t_init=(2.5, "fixed noise level of the generator (the paper's)"),
    noise=("lognormal", "noise levels at which densities are compared: ln sigma normal, or uniform "
           "in the index of EDM's schedule", ["lognormal", "karras"]),
    p_mean=(-1.2, "lognormal: mean of ln sigma", finite),
    p_std=(1.2, "lognormal: standard deviation of ln sigma"),
    karras_share=(0.8, "karras: share of the schedule from its low end; 0.8 is up to 24.4 (SiD's)",
                  share),
    noise_weight=("none", "weight of the generator's loss over noise levels", list(NOISE_WEIGHTS)),
    lr=(None, "learning rate of the generator (Adam)", float),
    ratio_lr=(None, "learning rate of the ratio network (Adam)", float),
    lr_decay_kimg=(0.0, "cosine decay of both rates to 0 over so many thousand images; 0: constant;"
                   " None: over the whole run", not_negative),
    beta1=(0.0, "Adam's beta1 of both networks (the paper's); 0.9 collapses", fraction),
    beta2=(0.999, "Adam's beta2 of both networks", fraction),
    ema_halflife_kimg=(2000.0, "half-life of the averaged generator, thousands of images"),
    ratio_steps=(1, "steps of the ratio network per step of the generator (the paper's: 1)"),
    ratio_init=("pretrained", "start of the ratio network", ["pretrained", "random"]),
    xflip=(False, "mirror half of the images"),
)
# The paper gives t_init, beta1, ratio_steps and the divergences; all else is our choice. Reasons:
# docs/method.md, section 7; for the large systems docs/large-scale.md. SMALL takes two
# ratio steps: with one the ratio network falls behind the generator at 28x28.
SMALL = dict(batch=64, lr=1e-4, ratio_lr=3e-4, ratio_steps=2, lr_decay_kimg=None,
             ema_halflife_kimg=20.0, log_kimg=4.0, grid_kimg=32.0, save_kimg=16.0)
PRESETS = {
    "digits": dict(SMALL, data="digits", kimg=26.0, batch=32, ratio_lr=3.5e-4, p_mean=-2.0,
                   log_kimg=5.0, grid_kimg=20.0, save_kimg=20.0),
    "fashion-mnist": dict(SMALL, data="fashion-mnist", kimg=448.0),
    "cifar10-small": dict(SMALL, data="cifar10", xflip=True, kimg=256.0),
    "pictures": dict(resolution=64, xflip=True, kimg=5_000.0, batch=256, lr=5e-5, ratio_lr=2.5e-4,
                     ema_halflife_kimg=250.0, grid_kimg=200.0),
    "cifar10": dict(data="cifar10", init="edm-cifar10-32x32-uncond-vp.pkl", xflip=True,
                    kimg=20_000.0, batch=512, lr=1e-4, ratio_lr=5e-4, ema_halflife_kimg=500.0,
                    grid_kimg=200.0),
    "imagenet64": dict(data="imagenet-64x64.zip", init="edm-imagenet-64x64-cond-adm.pkl",
                       kimg=50_000.0, batch=2048, lr=8e-6, ratio_lr=4e-5, grid_kimg=200.0),
    # EDM2's weights have unit root mean square, far above EDM's: rates are relative to that.
    "imagenet512": dict(data="img512-sd.zip", init="edm2-img512-s-2147483-0.130.pkl", p_mean=-0.4,
                        p_std=1.0, kimg=200_000.0, batch=2048, lr=5e-5, ratio_lr=2.5e-4,
                        grid_kimg=200.0),
}


def main():
    settings = SETTINGS | fid.SETTINGS
    args = training.arguments(__doc__, settings, PRESETS, "runs/{preset}/{divergence}")
    rt = training.Runtime(args.device, args.precision, args.batch, args.micro_batch)

    # Data, generator, ratio network. Dropout is off: the generator is a function of z.
    dataset = rt.main_first(lambda: data.load(args.data, resolution=args.resolution))
    torch.manual_seed(args.seed)
    init = pretrain.load_init(args, dataset)
    config = dataclasses.replace(init.config, dropout=0.0)
    generator, ratio = networks.Denoiser(config), networks.RatioNetwork(config)
    generator.load_state_dict(init.state_dict())
    if args.ratio_init == "pretrained":
        ratio.load_encoder(init)
    del init  # no teacher is kept
    for net in (generator, ratio):
        networks.place(net, rt.device, args.compile)
    # beta1 = 0: momentum would follow the gradients of earlier ratio networks.
    generator_optimizer = training.Optimizer(generator, rt, (args.beta1, args.beta2))
    ratio_optimizer = training.Optimizer(ratio, rt, (args.beta1, args.beta2))
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    ema.about = dict(role="generator", t_init=args.t_init, divergence=args.divergence,
                     data=args.data, seed=args.seed,
                     class_frequencies=dataset.class_frequencies(config.label_dim))
    ratio.about = ema.about | {"role": "ratio"}
    run = training.Run(args, rt, "stage 2", dataset, generator=generator, ratio=ratio, ema=ema,
                       generator_optimizer=generator_optimizer, ratio_optimizer=ratio_optimizer)
    batches = data.batches(dataset, rt, args.seed, run.nimg * args.ratio_steps, args.xflip)
    shape = (config.img_channels, config.img_resolution, config.img_resolution)
    G = functools.partial(sample.one_step, generator, t_init=args.t_init)  # G(z, labels)

    def generator_objective(z, fake, sigma, eps, labels):
        fake = fake if fake.requires_grad else G(z, labels)  # micro-batches: no graph was kept
        run.add_gradient(sigma, fake)
        weight = NOISE_WEIGHTS[args.noise_weight](sigma)
        return [weight * generator_loss(ratio, fake, sigma, eps, args.divergence, labels)]

    def write_networks(suffix="", **about):
        for name, net in (("network", ema), ("ratio", ratio)):
            checkpoints.save_network(run.dir / f"{name}{suffix}.pt", net, nimg=run.nimg, **about)

    measure_fid = fid.training_fid(args, dataset, run, ema, write_networks)
    while run.unfinished():
        factor = learning_rate_factor(args, run.nimg)
        # 1. Ratio: tell noised data from noised samples of the present generator. This comes first:
        #    with a ratio that lags one generator step, FD doubles (exercise 5).
        ratio.requires_grad_(True)
        for k in range(args.ratio_steps):
            rt.seed(args.seed, run.nimg, k, "stage 2")  # decides all that is drawn until the next
            real, labels = next(batches)  # samples have the classes of the data
            z, sigma = rt.randn(*shape), noise_levels(args, rt)
            fake = rt.in_parts(G, z, labels, graph=k == args.ratio_steps - 1)  # step 2 needs it
            eps_real, eps_fake = rt.randn(*shape), rt.randn(*shape)
            _, h_real, h_fake = ratio_optimizer.step(
                args.ratio_lr * factor, lambda *tensors: ratio_loss(ratio, *tensors),
                real, fake.detach(), sigma, eps_real, eps_fake, labels)
            run.add(bands=training.band_sums(sigma, h_real, h_fake))

        # 2. Generator: the same samples, noised anew, judged by the ratio just trained, now frozen.
        ratio.requires_grad_(False)
        sigma, eps = noise_levels(args, rt), rt.randn(*shape)
        (loss,) = generator_optimizer.step(
            args.lr * factor, generator_objective, z, fake, sigma, eps, labels)
        run.add(generator_loss=loss.sum())
        run.advance()  # counts the images; all ranks agree whether to stop
        networks.update_ema(ema, generator, args.batch, args.ema_halflife_kimg * 1000, run.nimg)

        # 3. Log, look, save, measure.
        if run.due(args.log_kimg):
            run.report(*training.stage2_line(run.pop_means()))
        if run.due(args.grid_kimg):
            sample.preview(ema, run, args.seed)
        if run.due(args.save_kimg) or run.due(args.fid_every) or run.stopping:
            run.save(write_networks)  # after a signal this ends the script
        measure_fid()  # when it is due


if __name__ == "__main__":
    training.run(main)
