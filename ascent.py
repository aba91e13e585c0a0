"""The fit of a mixture's plan to two samples: an ascent of the dual, carried down from the mean cost to the eps wanted.

    ascend      E_Q log v(y) - E_P log sum_k a_k exp((x.S_k x + 2 r_k.x) / (2 eps))      the dual objective over eps

    plan = ascent.fit(x, y, eps=0.1)        in a notebook: tensors (n, D), (m, D); plan is a mixture.Plan

torch only.
"""
import copy
import math

import torch
import torch.nn.functional as F

from mixture import Mixture, Plan, gaussian_map, log_sum, noise_shares

ROWS_PER_RANK = 15       # rows of a component for each column of its U
ROWS_PER_COMPONENT, ROWS_PER_COLUMN = 50, 0.5  # rows that a component needs: so many, and so many a data column
SIZES, STARTS = (5, 20, 40, 60, 100, 200, 400), 5  # components tried; k-means starts of each, of which the best goes on
PRIOR = 0.3              # pseudo-rows for each column of the data that pull S_k to I in the basis: see ascend
COOLING = 10 ** 0.5      # eps falls from the mean cost, from stage to stage by at most this factor
STEPS = 60, 50, 200      # of Adam: to choose the number of components, of a stage, at the eps asked for
UNFINISHED = *STEPS[:2], STEPS[1]  # the same where finish() follows, which takes the last STEPS[2]
FULL_COLUMNS = 16        # with S_k of full rank, k times as many columns take k times the steps, or lag behind eps
BATCH, WORK = 2048, 2 ** 27  # a batch: an eighth of all rows, at most WORK / parameters, at least BATCH
RATE = 0.03              # learning rate, in each parameter's own scale, falling to 0 by a cosine
FINE = 1000              # numbers in a U_k: of more, where rows are many, each moves less, or their noise adds up
BETAS = 0.9, 0.99        # of Adam
FEW, MANY, CHECKED = 20_000, 200_000, 10_000  # rows for a start; most rows seen; rows for a stage's objective


# ------------------------------------------------------------------------------------------------ one Gaussian

def covariance_within(z, weights, prior):
    """Pooled covariance (D, D), float64, within the components of z (n, D) with responsibilities weights (n, K); shrunk
    to its diagonal as by prior * n more rows."""
    mass, second = weights.mean(0).double().clamp_min(1e-12), (z.T @ z).double() / len(z)
    sums = (weights.T @ z).double() / len(z)
    S = second - sums.T @ (sums / mass[:, None])
    S = S.lerp(S.diag().diag(), prior / (1 + prior))
    # equal points, constant columns, values of a grid: widened where float32 cannot tell S from a singular one
    least = (4e-6 * torch.linalg.matrix_norm(second) + 1e-12) * torch.eye(len(S), dtype=S.dtype, device=S.device)
    return S + 2 * least * (torch.linalg.cholesky_ex(S - least)[1] > 0)


def moments(z, shares):
    """Means (K, D) and covariances (K, D, D), float64, of parts of z (n, D) that shares (n, K) make."""
    mass = shares.mean(0).double().clamp_min(1e-12)
    mean = (shares.T @ z).double() / len(z) / mass[:, None]
    away = ((z - m).mul_(share.sqrt()[:, None]) for m, share in zip(mean.float(), shares.T))
    return mean, torch.stack([(a.T @ a).double() for a in away]) / len(z) / mass[:, None, None]


def gaussian_plan(x, y, eps):
    """The plan between the Gaussians of x (n, D) and y (m, D)."""
    plan, prior = Mixture(x.shape[1], 1, 0, eps).to(x.device), x.shape[1] / min(len(x), len(y))
    P, Q = (covariance_within(z, z.new_ones(len(z), 1), prior) for z in (x, y))
    plan.turn(torch.linalg.cholesky(gaussian_map(P, Q, eps)))
    plan.r[0] = y.mean(0) @ plan.inverse.T - x.mean(0) @ plan.R
    return plan


# ------------------------------------------------------------------------------------------------ one stage

class MeanLogSum(torch.autograd.Function):
    """Mean over rows z of logsumexp_k forms(z, ...), with its gradient in all but z at once: what autograd would keep
    from forward to backward does not fit the cache, but parts of a batch do."""

    @staticmethod
    def forward(ctx, z, const, square, linear, factor):
        total, grads = 0.0, [torch.zeros_like(t) for t in (const, square, linear, factor.flatten(1))]
        for part in z.split(max(64, 2 ** 18 // max(factor[0].numel(), 256))):
            squares, seen = part.square(), (part @ factor.flatten(1)).view(len(part), *factor.shape[1:])
            out = torch.addmm(const, part, linear.T).addmm_(squares, square.T).add_(seen.square().sum(1))
            log_of_sum, share = log_sum(out)
            total = total + log_of_sum.sum()
            grads[0] += share.sum(0)
            grads[1].addmm_(share.T, squares)
            grads[2].addmm_(share.T, part)
            grads[3].addmm_(part.T, seen.mul_(share[:, None]).flatten(1), alpha=2)
        ctx.save_for_backward(*grads[:3], grads[3].view(factor.shape))
        ctx.n = len(z)
        return total / ctx.n

    @staticmethod
    def backward(ctx, grad):
        return None, *(g * (grad / ctx.n) for g in ctx.saved_tensors)


def k_means(y, k, steps=20):
    """Centres (k, D) of y (n, D): k-means++, then `steps` of Lloyd's."""
    centres, far = y[torch.randint(len(y), (1,), device=y.device)], y.new_full((len(y),), math.inf)
    while len(centres) < k:
        far = torch.minimum(far, (y - centres[-1]).square().sum(1) + 1e-30)
        centres = torch.cat([centres, y[torch.multinomial(far, 1)]])
    for _ in range(steps):
        near = F.one_hot(torch.cdist(y, centres).argmin(1), k).to(y.dtype)
        centres = torch.where(near.sum(0)[:, None] > 0, near.T @ y / near.sum(0).clamp_min(1)[:, None], centres)
    return centres


@torch.no_grad()
def start(plan, x, y, prior):
    """Parts of Q by k-means, all x in every part: as at large eps, where y hardly depends on x."""
    K, D, rank = plan.U.shape
    near = torch.cdist(y, k_means(y[torch.randperm(len(y), device=y.device)[:5000]], K)).argmin(1)
    parts = F.one_hot(near, K).to(y.dtype)
    P, Q = covariance_within(x, x.new_ones(len(x), 1), prior), covariance_within(y, parts, prior)
    plan.turn(torch.linalg.cholesky(gaussian_map(P, Q, plan.eps)))
    z, x_mean = y @ plan.inverse.T, x.mean(0) @ plan.R
    pooled = plan.inverse.double() @ Q @ plan.inverse.double().T
    for k in range(K):
        own = z[near == k]
        away = (own - own.mean(0)).double()
        excess = (away.T @ away - len(own) * pooled) / (len(own) + prior * len(y)) / plan.eps
        values, vectors = torch.linalg.eigh(torch.eye(D, device=y.device) + excess)
        values = values.clamp_min(0.05)
        level = values[:-rank].mean() if 0 < rank < D else values[0] / 2
        factor = vectors[:, D - rank:] * (values[D - rank:] - level).clamp_min(1e-2).sqrt()
        plan.U[k] = factor
        plan.d[k] = ((vectors * values) @ vectors.T - factor @ factor.T).diagonal().clamp_min(0.05)
        plan.r[k] = (own.mean(0) if len(own) else z[k]) - plan.S_times(x_mean, k)
    return plan


@torch.no_grad()
def balance(plan, x, y, steps=30, tolerance=1e-3):
    """Move a_k until component k has the same mass under P and Q, by damped Newton steps: an ascent.
    -> the dual objective of the rows over eps, up to a constant."""
    log_w, log_v = plan.log_w(x) - plan.log_a, plan.log_v(y) - plan.log_a
    log_a, damping, value = plan.log_a.double(), 1.0, -math.inf
    new = log_a
    for _ in range(steps):
        (on_x, w), (on_y, v) = (log_sum(z + new.float()) for z in (log_w, log_v))
        risen = (on_y.double().mean() - on_x.double().mean()).item()
        if risen < value:
            damping *= 8
        else:
            log_a, value, damping = new, risen, max(damping / 4, 1e-4)
            mass, slope = w.mean(0).double(), (v.mean(0) - w.mean(0)).double()
            if slope.abs().sum() < tolerance:
                break
            few = w[::max(1, len(w) // FEW)]  # enough for a curvature
            curvature = mass.diag() - (few.T @ few).double() / len(few) + 1e-9 * torch.eye(len(mass), device=x.device)
        step = torch.linalg.solve(curvature + damping * (mass + 1e-4).diag(), slope)
        new = log_a + step.clamp(-5, 5)
    plan.log_a.copy_(log_a - log_a.logsumexp(0))
    return value


@torch.no_grad()
def cool(plan, eps, x, y, prior):
    """Go on at another eps: with the basis scaled as the pooled Gaussian plan's, or with r and S as they are, whichever
    has the larger objective there."""
    parts = [z.softmax(1) for z in (plan.log_w(x), plan.log_v(y))]
    P, Q = (covariance_within(z, part, prior) for z, part in zip((x, y), parts))
    old, new = (torch.linalg.cholesky(gaussian_map(P, Q, e)) for e in (plan.eps, eps))
    x_mean, y_mean = (part.T @ z / part.sum(0).clamp_min(1e-6)[:, None] for z, part in zip((x, y), parts))
    plan.log_a *= plan.eps / eps
    plan.eps = eps
    moved = copy.deepcopy(plan)
    moved.turn(new @ torch.linalg.solve_triangular(old, plan.R.double(), upper=False))
    for k, mean in enumerate(x_mean @ moved.R):
        moved.r[k] = y_mean[k] @ moved.inverse.T - moved.S_times(mean[None], k)[0]
    if balance(moved, x, y) > balance(plan, x, y):
        plan.load_state_dict(moved.state_dict())


@torch.no_grad()
def ascend(plan, x, y, near, prior, steps):
    """A stage, at one eps: Adam on the dual objective of batches, whose noise leads out of poor optima; masses are
    balanced after every quarter.  Of the states there it keeps the best on near = (x, y), held-out rows, among those
    with a training objective not below the start's: on the last rows, as the start overfits those that made it.

    Parameters move relative to where they are, each in its own scale.  A penalty is least where S_k is I in the basis,
    as that of the Gaussian plan of the pooled covariances: without it few rows would overfit S_k."""
    checked, state = (x[-CHECKED:], y[-CHECKED:]), [getattr(plan, name).clone() for name in ("log_a", "r", "d", "U")]
    (log_a, r, d, U), sizes = state, [t.numel() for t in state]
    root, width, K = d.sqrt(), math.sqrt(plan.eps) * d.sqrt(), len(log_a)
    fine = root[..., None] * (min(1.0, FINE / max(1, U[0].numel())) if len(x) > FEW else 1.0)
    moves = torch.zeros(sum(sizes), device=x.device, requires_grad=True)
    mean, square = torch.zeros_like(moves), torch.zeros_like(moves)  # of the gradient, for Adam
    first, best = balance(plan, *checked), (plan.objective(*near).item(), plan.kept())
    moves[:K] = plan.log_a - log_a

    def some(z):
        rows = max(BATCH, min(len(z) // 8, WORK // len(moves)))
        return z if len(z) <= rows else z[torch.randint(len(z), (rows,), device=z.device)]

    def put(moves):
        of_log_a, of_r, of_d, of_U = (part.view_as(t) for part, t in zip(moves.split(sizes), state))
        plan.log_a, plan.r = log_a + of_log_a, r + width * of_r
        plan.d, plan.U = (d * of_d.exp()).clamp(1e-3, 1e4), U + fine * of_U  # atoms would end at 0

    try:
        for step in range(steps):
            with torch.enable_grad():
                put(moves)
                det = plan.log_det()
                loss = MeanLogSum.apply(some(x) @ plan.R, *plan.of_x())
                loss -= MeanLogSum.apply(some(y) @ plan.inverse.T, *plan.of_y(det))
                loss += PRIOR * prior / 2 * (plan.d.sum() + plan.U.square().sum() - det[0].sum())
                grad, = torch.autograd.grad(loss, moves)
            mean.lerp_(grad, 1 - BETAS[0])  # Adam by hand: torch.optim takes two seconds to start
            square.lerp_(grad.square(), 1 - BETAS[1])
            of_mean, of_square = (1 - beta ** (step + 1) for beta in BETAS)  # both averages start at 0
            rate = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            moves -= rate / of_mean * mean / ((square / of_square).sqrt() + 1e-8)
            if (step + 1) % max(1, steps // 4) == 0:
                put(moves)
                value, on_near = balance(plan, *checked), plan.objective(*near).item()
                if value >= first and on_near > best[0]:
                    best = on_near, plan.kept()
                moves[:K] = plan.log_a - log_a
    except torch.linalg.LinAlgError:  # a step too far for float32
        pass
    plan.load_state_dict(best[1], assign=True)  # in place of tensors with a graph
    if max(len(x), len(y)) > CHECKED:
        balance(plan, x, y)


@torch.no_grad()
def settle(plan, x, y, near, steps=30):
    """If the S_k have full rank: fixed-point steps, as in EM, to where the gradient is 0.  Each component moves towards
    the Gaussian plan between its shares of P and Q, while the objective rises.  Keeps the best on near = (x, y).  Where
    the true plan is a mixture's, this halves the error that Adam's noise leaves; elsewhere it soon stops."""
    if plan.U.shape[2] < plan.U.shape[1]:
        return
    best, value, share = (plan.objective(*near).item(), plan.kept()), balance(plan, x, y), 1.0
    for _ in range(steps):
        before, S = plan.kept(), (plan.d.diag_embed() + plan.U @ plan.U.mT).double()
        try:
            x_mean, P = moments(x @ plan.R, plan.log_w(x).softmax(1))
            y_mean, Q = moments(y @ plan.inverse.T, plan.log_v(y).softmax(1))
            T = gaussian_map(P, Q, plan.eps)
            plan.r.lerp_((y_mean - (T @ x_mean[..., None]).squeeze(2)).float(), share)
            values, vectors = torch.linalg.eigh(S.lerp(T, share))
            values = values.clamp_min(2e-3)  # float32 tells no smaller ones from 0
            plan.d.copy_(values[:, :1].expand_as(plan.d) / 2)  # what is left is U U^T
            plan.U.copy_(vectors * (values - values[:, :1] / 2).sqrt()[:, None])
            risen = balance(plan, x, y) - value
        except torch.linalg.LinAlgError:  # a component without rows
            risen = -math.inf
        if risen > 0:
            value, share = value + risen, min(1.0, 1.5 * share)
            best = max(best, (plan.objective(*near).item(), plan.kept()), key=lambda tried: tried[0])
        else:
            share /= 2
            plan.load_state_dict(before)
        if 0 < risen < 1e-6 or share < 0.02:
            break
    plan.load_state_dict(best[1])


# ------------------------------------------------------------------------------------------------ all stages

def difference(on_y, on_x):
    """Of the means of two samples, and its standard error (0-dim)."""
    return on_y.mean() - on_x.mean(), (on_y.var() / len(on_y) + on_x.var() / len(on_x)).sqrt()


def gain_of(new, old, x, y):
    """What rows gain in the dual objective from mixture new over old, and its standard error."""
    on_y, on_x = new(y) - old(y), new.eps * (new.log_z(x) - old.log_z(x))
    return tuple(value.item() for value in difference(on_y, on_x))


@torch.no_grad()
def anneal(x, y, near, epses, say=lambda plan, what, left: None, sizes=SIZES, steps=STEPS):
    """For each of epses, from the largest, yields a mixture (of too few rows the Gaussian plan), the Gaussian plan, and
    whether mixtures are clearly better at eps = mean cost, where fewer rows can tell than at a small eps.

    near = (x, y): validation rows.  The number of components is chosen at eps = mean cost, where a fit is cheap: it
    grows while near gains over two standard errors.  The mixture found is then carried down from stage to stage:
    started at a small eps, it would end in a poor optimum."""
    dim, n, (x, y), few = x.shape[1], min(len(x), len(y)), (x[:MANY], y[:MANY]), (x[:FEW], y[:FEW])
    prior, top = dim / n, max((x.var(0).sum() + y.var(0).sum()).item() / 2, max(epses))
    best, found = gaussian_plan(x, y, top), None
    most = int(n / max(ROWS_PER_COMPONENT, ROWS_PER_COLUMN * dim))  # that the rows carry: tried in place of more
    for components in sorted({min(size, most) for size in sizes if most >= sizes[0]}):
        rank = min(dim, min(n, FEW) // (components * ROWS_PER_RANK))
        starts = (start(Mixture(dim, components, rank, top).to(x.device), *few, prior) for _ in range(STARTS))
        new = max(starts, key=lambda plan: plan.objective(*few))
        ascend(new, x, y, near, prior, steps[0])
        gain, error = gain_of(new, best, *near)
        say(new, f"{gain / error:.3g} standard errors above fewer", 0)
        found = found or new  # even without a gain: clusters of P alone do not show at this eps
        if not gain > 2 * error:
            break
        best = found = new
    for eps in sorted(epses, reverse=True):
        if found is not None:
            full, stages = found.U.shape[2] == dim, math.log(found.eps / eps) / math.log(COOLING) - 1e-6
            stage = steps[1] * (max(1, dim // FULL_COLUMNS) if full else 1)
            ending = max(stage, steps[2])
            for left in range(max(1, math.ceil(stages)), 0, -1):
                cool(found, found.eps * (eps / found.eps) ** (1 / left), *few, prior)
                last = left == 1
                ascend(found, x, y, near, prior, ending if last else stage)
                if last:
                    settle(found, x, y, near)
                say(found, "done" if last else "cooling", 0 if last else left - 2 + ending / stage)
        of_one = gaussian_plan(x, y, eps)
        yield copy.deepcopy(found or of_one), of_one, len(best.r) > 1


def finish(plan, x, y):
    """The last steps, on training and validation rows: once the choice is made, the latter are worth more as data."""
    checked = x[-CHECKED:], y[-CHECKED:]
    ascend(plan, x, y, checked, x.shape[1] / min(len(x), len(y)), STEPS[2])
    settle(plan, x, y, checked)


def fit(x, y, eps=None, share=0.1, say=lambda plan, what, left: None):
    """The plan between samples x (n, D), y (m, D) at eps, or at the eps where `share` of y's variance is noise given x;
    a tenth of the rows choose only."""
    x, y = (torch.as_tensor(z).double() for z in (x, y))
    unit = ((x.var(0).mean() + y.var(0).mean()) / 2).sqrt()
    _, eps_of = noise_shares(*(torch.cov(z.T / unit).reshape(2 * x.shape[1:]) for z in (x, y)))
    eps = eps / unit.item() ** 2 if eps else eps_of(share)
    own = [((z - z.mean(0)) / unit).float()[torch.randperm(len(z))] for z in (x, y)]
    near, rest = zip(*((z[:len(z) // 10], z[len(z) // 10:]) for z in own))
    (found, of_one, _), = anneal(*rest, near, [eps], say)
    better = found if len(found.r) > 1 and gain_of(found, of_one, *near)[0] > 0 else of_one
    return Plan(better, x.mean(0), y.mean(0), unit)
