"""Gaussian -> Gaussian in 2 to 128 dimensions by energy-guided entropic OT, cost |x-y|^2/2: the exact plan is known.

    P = N(0, S0), Q = N(0, S1)                                 random rotations, standard deviations from 1/2 to 2
    R = (4 S0^1/2 S1 S0^1/2 + eps^2 I)^1/2,  C = (S0^1/2 R S0^-1/2 - eps I) / 2
    plan  N(0, [[S0, C], [C^T, S1]]),  pi(.|x) = N(T x, eps T),  T = C^T S0^-1,  grad f(y) = y - T^-1 y

    python train_gauss.py --dim 16 --eps 1    a minute on one CPU core, half of it training, 0.8 GiB
    python train_gauss.py --table             twelve cells, dim 2, 16, 64, 128 by eps 0.1, 1, 10: 14 minutes on one core
    python train_gauss.py --smoke             the same path in seconds

Writes beside itself (or under --out) gauss_dim16_eps1_seed0.pt, which --resume carries on from, and its figure
(.png); --table writes those of every cell and gauss_table_seed0.txt and .png, and with --resume goes on where it was stopped.

f is an MLP that knows nothing of quadratics.  One rule for every dim and eps, no table of settings:
    chains      as many as a batch, each moved once a step: chains that lag behind f make it swing and run away
    step        in units of the chains' own spread about their regression on x, its length led by the accepted fraction
    new x       a twentieth of the chains per step start at a fresh x, at the regression plus another chain's residual;
                from y = x they would be far outside what f knows
    f           sqrt(10 eps) net: f is of the order of the cost at small eps, of eps times the log-density of Q at large
    Adam        without momentum, which would swing against the chains, and warmed up for a third of the steps

Bures-Wasserstein error in per cent, 100 BW^2(a, b) / (tr S_b / 2), of sample means and covariances against the exact ones,
beside the floor, that of as many exact samples:
    plan_uvp    joint law of (x, y), 2 dim dimensions
    target_uvp  law of y
    cond_uvp    pi(.|x), mean over TEST_X sources
    field       in the log: E_Q |grad (f - exact f)|^2 in the metric T / eps, per dimension; 0 only if f is right
"""
import math
import os
import signal
import subprocess
import sys
import time

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import common


def whole(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


whole.__name__ = "whole number from 1 up"  # as argparse's error names it
args = common.arguments(__doc__, __file__, eps=1.0, dim=dict(type=whole, default=16, help="of x and of y (default 16)"),
                        table=dict(action="store_true", help="all twelve cells, a table and its figure; --dim and --eps are unused"))
stop = common.Stop()
torch.set_flush_denormal(True)

# ---------------------------------------------------------------------------------------------- constants
DIM = args.dim
EPS = args.eps
SEED = args.seed
LEAST_STEPS, DIM_STEPS = 1000, 6000  # Adam steps: the larger of LEAST_STEPS and DIM_STEPS / dim; in 2 dimensions detail is left
BATCH = 512              # chains, all moved each step, and target samples per step
WIDTH, DEPTH = 1024, 1   # two layers of 256 cost as much and stall at dim 128, a tenth short in |y|
SCALE = math.sqrt(10 * EPS)  # f = SCALE * net
LR, BETAS = 3e-3, (0.0, 0.99)  # of Adam; falls to 0 by a cosine.  0.999 remembers the first, large gradients for too long
WARMUP = 330             # steps
AVERAGE = 0.998          # of the weights, per step
ETA, MAX_ETA, ACCEPT = 0.4, 1.4, 0.75  # first and largest Langevin step, drawn from 0 to eta per chain; accepted fraction sought
REFRESH = 0.05           # share of the chains given a new x per step
MEMORY = 0.02            # per step, of the running covariance of (x, y)
NARROWEST = 0.02         # of a direction's variance against the mean: bounds what few chains can misjudge
REGRESS_EVERY = 10       # steps
ROUNDS = 8               # Langevin steps at test time
SAMPLES = 100_000        # of the plan
TEST_X, TEST_Y = 10, 2000  # sources of cond_uvp, samples of each
DATA_SEED = 1            # of the rotations
DIMS, EPSES = (2, 16, 64, 128), (0.1, 1, 10)  # of the table
if args.smoke:
    LEAST_STEPS, DIM_STEPS, BATCH, WIDTH, WARMUP, ROUNDS, SAMPLES, TEST_X, TEST_Y = 30, 0, 64, 32, 10, 3, 2000, 4, 200
    DIMS, EPSES = (2, 3), (1,)


def steps_in(dim):
    return max(LEAST_STEPS, DIM_STEPS // dim)


STEPS = steps_in(DIM)
LOG_EVERY = max(1, STEPS // 12)
CONSTANTS = common.constants_of(globals())

device = args.device
begun = time.perf_counter()


def file(name, ending):
    return os.path.join(args.out, f"gauss_{name}_seed{SEED}{'_smoke' * args.smoke}{ending}")


# ---------------------------------------------------------------------------------------------- the table: a process a cell

def read_finals(path):
    """{(dim, eps): {key: number}} of the `final` lines of finished cells in a file, half-written ones left out."""
    rows = []
    if os.path.exists(path):
        for line in open(path, encoding="utf-8"):
            words = line.split()[1:]
            if line.startswith("final dim ") and len(words) % 2 == 0 and words[-2] == "total_s":
                rows.append(dict(zip(words[::2], map(float, words[1::2]))))
    return {(row["dim"], row["eps"]): row for row in rows if row["steps"] == steps_in(int(row["dim"]))}


def append(path, line):
    try:
        with open(path, "a", encoding="utf-8") as out:
            out.write(line)
    except OSError as error:
        common.fail(f"cannot write {path} ({error.strerror}): free some space or name another folder with --out")


def table():
    path = file("table", ".txt")
    if not args.resume:
        common.keep_old(path)
    append(path, "\n" if os.path.exists(path) else "")  # ends a half-written line; a folder without permission shows now
    cell, asked = None, []

    def ask(number, frame):
        asked.append(number)
        if cell:
            cell.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    missing = [(dim, eps) for dim in DIMS for eps in EPSES if (dim, eps) not in read_finals(path)]
    for dim, eps in missing:
        options = ["--dim", str(dim), "--eps", str(eps), "--seed", str(SEED), "--out", args.out, "--device", str(device)]
        begun_before = args.resume and (dim, eps) == missing[0] and os.path.exists(file(f"dim{dim}_eps{eps:g}", ".pt"))
        command = [sys.executable, os.path.abspath(__file__), *options, *["--smoke"] * args.smoke, *["--resume"] * begun_before]
        cell = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)  # Ctrl-C once, from here
        if asked:
            cell.send_signal(asked[-1])
        for line in cell.stdout:
            print(line, end="", flush=True)
            if line.startswith("final "):
                append(path, line)
        code = cell.wait()
        if asked or (code == 0 and (dim, eps) not in read_finals(path)):
            print("stopped: --table --resume goes on from here")
            raise SystemExit(0)
        if code:
            common.fail(f"the cell dim {dim} eps {eps:g} failed: see above, then go on with --table --resume")
    finals = read_finals(path)
    print(f"{'plan_uvp (its floor), %':28s}" + "".join(f"{f'eps {eps:g}':>26s}" for eps in EPSES))
    for dim in DIMS:
        cells = [finals[dim, eps] for eps in EPSES]
        print(f"dim {dim:<24d}" + "".join(f"{c['plan_uvp']:.4f} ({c['plan_floor']:.4f}) {c['train_s']:.0f} s".rjust(26) for c in cells))
    fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", sharey=True)
    for axis, key in zip(axes, ("plan", "target", "cond")):
        for k, eps in enumerate(EPSES):
            for kind, style in (("uvp", "o-"), ("floor", ":")):
                axis.loglog(DIMS, [finals[dim, eps][f"{key}_{kind}"] for dim in DIMS], style, c=f"C{k}", base=2, label=f"eps {eps:g}" * (kind == "uvp"))
        axis.set(title={"plan": "plan (x, y)", "target": "marginal of y", "cond": "conditional $\\pi(\\cdot|x)$"}[key], xlabel="dimension")
        axis.set_yscale("log", base=10)
        axis.set_xticks(DIMS, DIMS)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("BW$^2$-UVP, %")
    axes[0].legend(title="dotted: exact samples")
    common.draw(fig, path[:-4] + ".png")
    print(f"wrote {path} and {path[:-4]}.png")
    print(f"final cells {len(finals)} worst_plan_uvp {max(c['plan_uvp'] for c in finals.values()):.4g} train_s {sum(c['train_s'] for c in finals.values()):.0f} "
          f"total_s {time.perf_counter() - begun:.0f}")


if args.table:
    table()
    raise SystemExit(0)

# ---------------------------------------------------------------------------------------------- the exact answer, in float64

def exact_plan(S0, S1, eps):
    """Covariance (2 dim, 2 dim) of the entropic plan between N(0, S0) and N(0, S1) (Janati et al. 2020), and T (dim, dim)."""
    T = common.gaussian_map(S0, S1, eps)
    C = S0 @ T
    return torch.cat([torch.cat([S0, C], 1), torch.cat([C.T, S1], 1)]), T


def uvp(samples, mean, S):
    """100 BW^2(samples, N(mean, S)) / (tr S / 2): (n, d), (d,), (d, d) -> per cent.

    The last trace as sum of singular values of a product of roots: the root of an eigenvalue near 0 would lose half the digits."""
    samples = samples.double()
    centred = samples - samples.mean(0)
    fidelity = torch.linalg.svdvals(common.root_of(centred.T @ centred / len(samples)) @ common.root_of(S)).sum()
    spread = centred.square().sum() / len(samples)
    return (100 * ((samples.mean(0) - mean).square().sum() + spread + S.trace() - 2 * fidelity) / S.trace()).item()


generator = torch.Generator().manual_seed(DATA_SEED)
deviations = 2 ** torch.linspace(-1, 1, DIM, dtype=torch.float64)
F0, F1 = (torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))[0] * deviations for _ in range(2))
S1 = F1 @ F1.T
plan, T = exact_plan(F0 @ F0.T, S1, EPS)
zero = torch.zeros(2 * DIM, dtype=torch.float64)
factors = F0.float().to(device), F1.float().to(device)


def source(n):
    return torch.randn(n, DIM, device=device) @ factors[0].T


def target(n):
    return torch.randn(n, DIM, device=device) @ factors[1].T


# ---------------------------------------------------------------------------------------------- training

def regress(moments):
    """Second moments (2D, 2D) of (x, y) -> slope (D, D) of y = x @ slope, root (D, D) of the residuals' covariance."""
    xx, xy, yy = moments[:DIM, :DIM], moments[:DIM, DIM:], moments[DIM:, DIM:]
    slope = torch.linalg.solve(xx + 1e-4 * torch.eye(DIM, device=device), xy)
    values, vectors = torch.linalg.eigh(yy - xy.T @ slope)
    return slope, vectors * values.clamp_min(NARROWEST * values.mean()).sqrt()


def begin(x):
    """Where chains start: at the regression on x plus the residual of a chain of the bank, drawn at random."""
    j = torch.randint(len(bank.x), (len(x),), device=device)
    return bank.y[j] + (x - bank.x[j]) @ slope


def move(f, x, y):
    return common.mala(f, x, y, EPS, eta * torch.rand(len(y), 1, device=device), 1, root=root)


def sample(f, x):
    """y ~ pi_f(.|x), by ROUNDS steps, each of its own length."""
    out = []
    for x in x.split(2 ** 11):
        y = begin(x)
        for _ in range(ROUNDS):
            y = move(f, x, y)[0]
        out.append(y)
    return torch.cat(out)


precision, T32 = torch.linalg.inv(T).float().to(device), T.float().to(device)
field_y = target(2000)


def field():
    """How far grad f_avg is from the exact y - T^-1 y."""
    y = field_y.clone().requires_grad_(True)
    error = torch.autograd.grad(f_avg(y).sum(), y)[0] - (field_y - field_y @ precision)
    return ((error @ T32) * error).sum(1).mean() / (EPS * DIM)


f, f_avg = (common.MLP(DIM, WIDTH, DEPTH, SCALE).to(device) for _ in range(2))
f_avg.load_state_dict(f.state_dict())
opt = torch.optim.Adam(f.parameters(), lr=LR, betas=BETAS, fused=True)
start = source(BATCH)
bank = common.Bank(start, start)
eta = torch.tensor(ETA, device=device)
slope, root = torch.eye(DIM, device=device), math.sqrt(EPS) * torch.eye(DIM, device=device)  # exact while f = 0
moments = torch.zeros(2 * DIM, 2 * DIM, device=device)

checkpoint, figure = file(f"dim{DIM}_eps{EPS:g}", ".pt"), file(f"dim{DIM}_eps{EPS:g}", ".png")
parts = {"f": f, "f_avg": f_avg, "opt": opt, "bank": bank}
state = common.begin(checkpoint, parts, CONSTANTS, args.resume)
if args.resume:
    eta, slope, root, moments = (state[k].to(device) for k in ("eta", "slope", "root", "moments"))
step, progress = state["step"], common.Progress(STEPS, state["step"], state["seconds"], device)


def save():
    state = {k: v.cpu() for k, v in (("eta", eta), ("slope", slope), ("root", root), ("moments", moments))}
    common.save(checkpoint, parts, step=step, seconds=progress.seconds, constants=CONSTANTS, code=open(__file__, encoding="utf-8").read(), **state)


save()  # a full disk or a folder without permission shows now, not in an hour
stop.armed, last = True, step == STEPS
while not last:
    step += 1
    opt.param_groups[0]["lr"] = common.warm_cosine(LR, step, WARMUP, STEPS)
    fresh = torch.rand(BATCH, 1, device=device) < REFRESH
    new = source(BATCH)
    bank.y = torch.where(fresh, begin(new), bank.y)
    bank.x = torch.where(fresh, new, bank.x)
    bank.y, _, accepted = move(f, bank.x, bank.y)
    eta = (eta * torch.exp(0.03 * (accepted - ACCEPT))).clamp(max=MAX_ETA)

    pairs = torch.cat([bank.x, bank.y], 1)
    moments = moments.lerp(pairs.T @ pairs / BATCH, max(MEMORY, 1 / step))
    if step % REGRESS_EVERY == 0 and step * BATCH > 20 * DIM:
        slope, root = regress(moments)
    gap = common.train_step(f, opt, target(BATCH), bank.y)
    common.average_weights(f_avg, f, AVERAGE, step)

    last, due = step == STEPS or bool(stop), progress.save_due()  # asked once: nothing is saved unchecked
    if due or last or step % LOG_EVERY == 0:
        largest = torch.cat([p.detach().flatten() for p in f.parameters()]).abs().max()
        now = dict(zip(("gap", "field", "y", "eta", "accept", "weight"),
                       torch.stack([gap, field(), bank.y.norm(dim=1).mean(), eta, accepted, largest]).tolist()))  # with regress, the only syncs
        common.stop_if_diverged(1e3, gap=now["gap"] / SCALE, y=now["y"], weight=now.pop("weight"))
        progress.line(step, **now)
    if due:
        save()
train_s = progress.seconds
save()

# ---------------------------------------------------------------------------------------------- scores and figure

x = source(SAMPLES)
y = sample(f_avg, x)
learned = torch.cat([x, y], 1).cpu()
exact = torch.randn(SAMPLES, 2 * DIM, dtype=torch.float64) @ common.root_of(plan)
scores = {"plan_uvp": uvp(learned, zero, plan), "plan_floor": uvp(exact, zero, plan),
          "target_uvp": uvp(learned[:, DIM:], zero[DIM:], S1), "target_floor": uvp(exact[:, DIM:], zero[DIM:], S1)}
test_x = source(TEST_X)
test_y = sample(f_avg, test_x.repeat_interleave(TEST_Y, 0)).view(TEST_X, TEST_Y, DIM).cpu().double()
means = test_x.cpu().double() @ T
exact_y = torch.randn(TEST_X, TEST_Y, DIM, dtype=torch.float64) @ common.root_of(EPS * T) + means[:, None]
for key, clouds in (("cond_uvp", test_y), ("cond_floor", exact_y)):
    scores[key] = sum(uvp(cloud, mean, EPS * T) for cloud, mean in zip(clouds, means)) / TEST_X

fig, axes = plt.subplots(1, 3, figsize=(13.5, 4.4), layout="constrained")
axis_1, axis_2 = torch.linalg.eigh(S1).eigenvectors[:, [-1, -min(2, DIM)]].T  # the target's widest
turn = torch.linspace(0, 2 * math.pi, 100, dtype=torch.float64)
circle = 2 * torch.stack([turn.cos(), turn.sin()])
view = torch.stack([axis_1, axis_2], 1)
axes[0].scatter(*(learned[:2000, DIM:].double() @ view).T, s=2, c="0.75", label="y, learned")
for k in range(min(4, TEST_X)):
    axes[0].scatter(*(test_y[k, :300] @ view).T, s=3, c=f"C{k}")
for k, (mean, S) in enumerate([(zero[DIM:], S1)] + [(m, EPS * T) for m in means[:4]]):
    centre, shape = (mean @ view)[:, None], common.root_of(view.T @ S @ view)
    axes[0].plot(*(centre + shape @ circle), c=f"C{k - 1}" if k else "k", lw=1.5, label=None if k else "exact, 2 deviations")
axes[0].legend(loc="upper right")
axes[0].set(title="y, and y given four x", xlabel="Q's two widest axes", aspect="equal")
covariance = learned.double().T @ learned.double() / SAMPLES
for axis, a, b, title in ((axes[1], plan[:DIM, DIM:].flatten(), covariance[:DIM, DIM:].flatten(), "entries of the cross-covariance C"),
                          (axes[2], torch.linalg.eigvalsh(plan), torch.linalg.eigvalsh(covariance), "eigenvalues of the plan's covariance")):
    axis.plot(a, a, c="k", lw=0.8, label="equal")
    axis.scatter(a, b, s=6)
    axis.set(title=title, xlabel="exact", ylabel=f"learned ({SAMPLES} samples)")
axes[2].set(xscale="log", yscale="log")
for axis in (axes[2].xaxis, axes[2].yaxis):
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())  # its labels would overlap
fig.suptitle(f"N(0, S0) to N(0, S1), dimension {DIM}, eps = {EPS:g}: plan BW$^2$-UVP {scores['plan_uvp']:.3g} % (exact samples {scores['plan_floor']:.2g} %), "
             f"{step} steps, {train_s:.0f} s")
common.draw(fig, figure)
print(f"wrote {figure} and {checkpoint}")

per_step = f.flops * BATCH * (2 * 2 + 3 * 2)  # two gradients in y, three passes of both halves of the loss
rate, busy = common.matmul_rate(device), per_step * step / max(train_s, 1e-9)
print(f"network arithmetic {per_step / 1e9:.2f} GFLOP a step, {busy / 1e9:.0f} GFLOP/s: {100 * busy / rate:.0f} % of the {rate / 1e9:.0f} GFLOP/s "
      f"of a float32 matrix product here")
print(f"final dim {DIM} eps {EPS:g} " + " ".join(f"{k} {v:.4g}" for k, v in scores.items()) +
      f" field {field().item():.3g} steps {step} train_s {train_s:.1f} total_s {time.perf_counter() - begun:.1f}")
