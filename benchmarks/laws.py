"""How well each law, and our forecast, predicts curves beyond what it was shown; and whether 90 % intervals hold 90 %.
Prints one JSON line.

    python benchmarks/laws.py DIR [--limit 300]

DIR is searched for curves in any of these forms (a domain is a file's name unless a column names it):
- CSV with columns curve, n, value; optionally domain, cluster (curves that are not independent), split (train or test)
- CSV with columns Domain, Task, Model, Seen Examples, Loss, Training (Alabdulmohsin et al. 2022), as published
- CSV with one curve per row and sizes as the names of columns (Lin et al. 2024)
- npz with er[data set, learner, mean or stderr, anchor, split] and anchors (LCDB 1.1): up to --limit curves that are
  precise enough to score
Where a file does not specify what is held out, it is every size above a quarter of the largest (above half for LCDB).
RMSLE is the root mean square of log prediction - log truth over a curve's held-out sizes, then the mean over curves.
Coverage is the mean over curves of the share of held-out points inside, its interval a bootstrap over clusters;
the interval score (Gneiting and Raftery 2007) is of log loss. The intervals of the laws are from the delta method;
the references have none.
"""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, itertools, json, platform, re, time, warnings
from importlib.metadata import version
from pathlib import Path
import numpy as np
import pandas as pd
from scipy import optimize, stats
from synthscale.forecast import forecast, make_curve
from synthscale.functional_forms import FORMS, fit_form, fit_joint, fit_tail

LEVEL = .9

# ---- curves: (domain, cluster, n, loss, held-out n, held-out loss)

def split(n, y, share):
    held = n > n.max()*share*(1+1e-9)
    return n[~held], y[~held], n[held], y[held]

def from_long(df, file):
    for c, g in df.groupby('curve', sort=False):
        n, y = g.n.to_numpy(float), g.value.to_numpy(float)
        parts = split(n, y, .25)
        if 'split' in g:
            m = g.split.eq('train').to_numpy()
            parts = n[m], y[m], n[~m], y[~m]
        domain = g.domain.iloc[0] if 'domain' in g else file.stem
        cluster = g.cluster.iloc[0] if 'cluster' in g else c
        yield domain, str(cluster), *parts

def from_seen_examples(df, file):
    for (d, t, m), g in df.groupby(['Domain', 'Task', 'Model'], sort=False):
        g = g.drop_duplicates().sort_values('Seen Examples', kind='stable')
        train = g.Training.astype(int).astype(bool).to_numpy()
        n, y = g['Seen Examples'].to_numpy(float), g.Loss.to_numpy(float)
        task = re.sub(r'[ _-]*[0-9]+[ _-]*(shot)?$', '', str(t))
        yield d, f'{m} {task}', n[train], y[train], n[~train], y[~train]

def from_wide(df, file):
    sizes = [c for c in df.columns if re.fullmatch(r'[0-9]+(\.[0-9]+)?', str(c)) and float(c) > 0]
    n = np.array([float(c) for c in sizes])
    for _, r in df.iterrows():
        y = r[sizes].to_numpy(float)
        ok = np.isfinite(y)
        yield file.stem, f'{file.stem} {r.iloc[0]}', *split(n[ok], y[ok], .25)

def from_lcdb(file, limit):
    z = np.load(file)
    er, anchors = z['er'], z['anchors'].astype(float)
    kept = 0
    for j in np.random.default_rng(0).permutation(er.shape[0]*er.shape[1]):
        d, l = divmod(int(j), er.shape[1])
        y, s = er[d, l, 0, :, 2].astype(float), er[d, l, 1, :, 2].astype(float)
        ok = np.isfinite(y) & (y > 0)
        n, y, s = anchors[ok], y[ok], s[ok]
        if len(n) < 24: continue                                          # too short to score
        if np.median(y[-5:]) > .8*np.median(y[:5]): continue              # not falling
        if np.median((s/y)[len(y)//2:]) > .04: continue                   # too noisy
        yield 'lcdb', f'lcdb {d}', *split(n, y, .5)
        kept += 1
        if kept == limit: return

def from_csv(df, file):
    "The curves of a table in whichever form it is; none where it is in no form that is known."
    if {'curve', 'n', 'value'} <= set(df): return from_long(df, file)
    if {'Domain', 'Task', 'Model', 'Seen Examples', 'Loss', 'Training'} <= set(df): return from_seen_examples(df, file)
    if sum(bool(re.fullmatch(r'[0-9]+', str(c))) for c in df.columns) >= 6: return from_wide(df, file)
    return []

def read_folder(folder, limit):
    found = []
    for f in sorted(Path(folder).rglob('*')):
        if f.suffix == '.npz' and 'er' in np.load(f).files:
            found += from_lcdb(f, limit)
        elif f.suffix == '.csv':
            found += from_csv(pd.read_csv(f), f)
    beyond = [(d, c, n, y, t[t > n.max()], z[t > n.max()]) for d, c, n, y, t, z in found if len(n)]
    return [c for c in beyond if len(np.unique(c[2])) >= 4 and len(c[4]) and min(c[3].min(), c[5].min()) > 0]

# ---- the papers' own estimators: errors are least squares in the transformed space of each equation

def ols(X, y):
    c, *_ = np.linalg.lstsq(X, y, rcond=None)
    return c, float(np.sum((y-X@c)**2))

def m1(n, y):
    x = np.log(n)
    (a, c), _ = ols(np.column_stack([np.ones_like(x), x]), np.log(y))
    return lambda t: np.exp(a+c*np.log(t))

def m2(n, y):
    "y = e + b n^c: log(y-e) on log n, e by search"
    x = np.log(n)
    X = np.column_stack([np.ones_like(x), x])

    def at(e):
        return ols(X, np.log(y-e))

    e = search(lambda e: at(e)[1], np.r_[0, y.min()*(1-np.geomspace(1e-4, 1, 60))])
    (a, c), _ = at(e)
    return lambda t: e+np.exp(a+c*np.log(t))

def m3(n, y):
    "y = b (1/n + g)^c"
    def X(g):
        return np.column_stack([np.ones_like(n), np.log(1/n+g)])

    g = search(lambda g: ols(X(g), np.log(y))[1], np.r_[0, np.geomspace(1e-3/n.max(), 1e3/n.min(), 80)])
    (a, c), _ = ols(X(g), np.log(y))
    return lambda t: np.exp(a+c*np.log(1/t+g))

def m4(n, y):
    "(y-e)/(e0-y)^alpha = b n^c: log(y-e) on log n and log(e0-y), e and e0 by search, alpha of at least 0"
    x = np.log(n)

    def at(p):
        e, e0 = y.min()*p[0], y.max()*p[1]
        if not (np.isfinite(e0) and e < y.min() and e0 > y.max()): return np.inf, None, e, e0
        X = np.column_stack([np.ones_like(x), x, np.log(e0-y)])
        c, s = ols(X, np.log(y-e))
        if c[2] < 0:
            (a, b), s = ols(X[:, :2], np.log(y-e))
            c = np.array([a, b, 0.])
        return s, c, e, e0

    def shares(q):
        return 1/(1+np.exp(-q[0])), 1+np.exp(q[1])

    grid = [(s, t) for s in np.r_[0, 1-np.geomspace(1e-3, .9, 12)] for t in 1+np.geomspace(1e-3, 10, 12)]
    best = min(grid, key=lambda p: at(p)[0])
    r = optimize.minimize(lambda q: at(shares(q))[0], [np.log((best[0]+1e-6)/(1-best[0])), np.log(best[1]-1)],
                          method='Nelder-Mead', options=dict(maxiter=400, xatol=1e-6, fatol=1e-12))
    _, (a, c, alpha), e, e0 = at(shares(r.x))
    lo, hi = e+(e0-e)*1e-12, e0-(e0-e)*1e-12

    def solve(v):
        "The loss at log size v."
        def f(l):
            return np.log(l-e)-alpha*np.log(e0-l)-a-c*v

        if f(lo) < 0 < f(hi): return optimize.brentq(f, lo, hi)
        return lo if f(lo) >= 0 else hi

    return lambda t: np.array([solve(v) for v in np.log(t)])

def search(f, grid):
    "The best of a grid, refined between its neighbours."
    v = [f(g) for g in grid]
    i = int(np.nanargmin(v))
    lo, hi = sorted((grid[max(0, i-1)], grid[min(len(grid)-1, i+1)]))
    if not hi > lo: return float(grid[i])
    r = optimize.minimize_scalar(f, bounds=(lo, hi), method='bounded', options=dict(xatol=1e-10*(hi-lo)+1e-300))
    return float(r.x) if r.fun < v[i] else float(grid[i])

REFERENCES = dict(m1_ref=m1, m2_ref=m2, m3_ref=m3, m4_ref=m4)

# ---- scores

def predictions(n, y, at):
    "(name, log prediction, lo, hi) of every method; lo and hi None where it has no interval."
    def interval(f):
        if f.dof < 1: return None, None
        h = stats.t.ppf(.5+LEVEL/2, f.dof)*f.sd(at)
        return f.log_loss(at)-h, f.log_loss(at)+h

    t = forecast(n, y, at=at, level=LEVEL).table
    yield 'synthscale', np.log(t.loss.to_numpy()), np.log(t.ci_lo.to_numpy()), np.log(t.ci_hi.to_numpy())
    c = make_curve(n, y)
    for form in FORMS:
        fitting = [form, 'floor', 'power']              # with fewer sizes than parameters, the largest law that fits
        use = next(name for name in fitting if len(c.n) >= FORMS[name].n_params)
        f = fit_form(c.n, c.loss, use)
        yield (form, f.log_loss(at), *interval(f))
    f = fit_tail(c.n, c.loss)
    yield ('tail', f.log_loss(at), *interval(f))
    yield 'persist', np.full(len(at), np.log(c.loss[-3:]).mean()), None, None
    for name, ref in REFERENCES.items():
        try:
            mu = np.log(np.maximum(ref(c.n, c.loss)(at), 1e-12))
        except (ValueError, FloatingPointError):
            mu = np.full(len(at), np.log(c.loss[-1]))
        yield name, mu, None, None

def score(curves):
    rows = []
    for i, (domain, cluster, n, y, at, truth) in enumerate(curves):
        start = time.perf_counter()
        forecast(n, y, at=at)
        seconds = time.perf_counter()-start
        for name, mu, lo, hi in predictions(n, y, at):
            e = np.log(truth)
            row = dict(domain=domain, cluster=cluster, method=name, rmsle=float(np.sqrt(np.mean((mu-e)**2))),
                       seconds=seconds if name == 'synthscale' else np.nan)
            if lo is not None:
                outside = np.clip(lo-e, 0, None)+np.clip(e-hi, 0, None)
                row |= dict(coverage=np.mean((lo <= e) & (e <= hi)), interval_score=np.mean(hi-lo+2/(1-LEVEL)*outside))
            rows.append(row)
    return pd.DataFrame(rows)

def cluster_interval(g, draws=2000):
    "90 % bootstrap interval over clusters of the mean coverage."
    by = g.groupby('cluster').coverage.agg(['sum', 'count']).to_numpy()
    i = np.random.default_rng(0).integers(0, len(by), (draws, len(by)))
    s = by[i].sum(1)
    return [round(float(v), 3) for v in np.quantile(s[:, 0]/s[:, 1], [.05, .95])]

def summary(df):
    out = {}
    for d, g in df.groupby('domain', sort=False):
        out[d] = dict(curves=int((g.method == 'synthscale').sum()), clusters=int(g.cluster.nunique()))
        for m, h in g.groupby('method', sort=False):
            r = dict(rmsle=round(h.rmsle.mean(), 4), median=round(h.rmsle.median(), 4))
            if h.coverage.notna().any():
                r |= dict(coverage=round(h.coverage.mean(), 3),
                          coverage_ci=cluster_interval(h.dropna(subset='coverage')),
                          interval_score=round(h.interval_score.mean(), 4))
            if m == 'synthscale':
                r |= dict(ms_median=round(1e3*h.seconds.median(), 1), ms_max=round(1e3*h.seconds.max(), 1))
            out[d][m] = r
    return out

def chinchilla(folder):
    "Share of the starts of Hoffmann's grid from which the optimum of the summed Huber loss is found."
    for f in Path(folder).rglob('*.csv'):
        df = pd.read_csv(f)
        if not {'Model Size', 'Training FLOP', 'loss'} <= set(df): continue
        df = df.sort_values('loss').iloc[:-5]           # the five highest losses dropped, as Besiroglu et al. 2024 do
        N, D = df['Model Size'].to_numpy(), (df['Training FLOP']/(6*df['Model Size'])).to_numpy()
        starts = itertools.product(np.arange(0, 2.5, .5), np.arange(0, 2.5, .5))
        fits = [fit_joint(N, D, df.loss.to_numpy(), s) for s in starts]
        best = min(fits, key=lambda f: f['huber'])
        agree = sum(f['huber'] < best['huber']*(1+1e-6) for f in fits)
        return dict(points=len(df), starts=len(fits), agree=agree,
                    huber=round(best['huber'], 8), a_opt=round(best['share'], 4))

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('dir')
    a.add_argument('--limit', type=int, default=300)
    a.add_argument('--rows', help="write every curve's scores to this CSV")
    a = a.parse_args()
    curves = read_folder(a.dir, a.limit)
    if not curves: raise SystemExit(f'{a.dir}: no curves found, expected one of the forms that --help names')
    with np.errstate(all='ignore'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        df = score(curves)
    if a.rows:
        df.to_csv(a.rows, index=False)
    versions = {p: version(p) for p in ('numpy', 'scipy', 'statsmodels')}
    out = dict(benchmark='laws', level=LEVEL, domains=summary(df), threads=1,
               python=platform.python_version(), **versions)
    if c := chinchilla(a.dir):
        out['chinchilla'] = c
    print(json.dumps(out))
