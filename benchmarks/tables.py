"""A table of one's own with many curves: each compared with one reference, and all pairs of a few. One JSON line.

    python benchmarks/tables.py [--curves 1000] [--pairs 30] [--sizes 6] [--seeds 3]

Times are CPU seconds of this process, with one thread.
"""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')
import argparse, contextlib, io, itertools, json, platform, tempfile, time
from importlib.metadata import version
import numpy as np
import pandas as pd
from synthscale.laws import fit_own

def made_up(n, sizes, seeds):
    "Curves of different exponents, with noise of 3 %."
    rng, rows = np.random.default_rng(0), []
    for i, k in enumerate(rng.uniform(.1, .5, n)):
        for m, s in itertools.product(100*2**np.arange(sizes), range(seeds)):
            rows.append((f'curve {i}', m, s, 3*float(m)**-k*np.exp(rng.normal(0, .03))))
    return pd.DataFrame(rows, columns=['curve', 'n_images', 'seed', 'value'])

def fitted(df, every_pair=False):
    "CPU seconds of `laws` on a table, and how many pairs it compared."
    with tempfile.TemporaryDirectory() as d, contextlib.redirect_stdout(io.StringIO()):
        df.to_csv(f'{d}/my.csv', index=False)
        if every_pair:
            pairs = itertools.combinations(df.curve.unique(), 2)
            pd.DataFrame(pairs, columns=['a', 'b']).to_csv(f'{d}/pairs.csv', index=False)
        start = time.process_time()
        fit_own(f'{d}/my.csv', d, compare=f'{d}/pairs.csv' if every_pair else '')
        return round(time.process_time()-start, 2), len(pd.read_csv(f'{d}/comparisons.csv'))

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(curves=1000, pairs=30, sizes=6, seeds=3).items():
        a.add_argument(f'--{name}', type=int, default=default)
    a = a.parse_args()
    few = made_up(a.pairs, a.sizes, a.seeds)
    fitted(few)                                                       # imports and caches
    (ref_s, ref_n), (all_s, all_n) = fitted(few), fitted(few, True)
    many_s, many_n = fitted(made_up(a.curves, a.sizes, a.seeds))
    print(json.dumps(dict(benchmark='tables', sizes=a.sizes, seeds=a.seeds,
                          one_reference=dict(curves=a.curves, pairs=many_n, cpu_s=many_s),
                          few=dict(curves=a.pairs, one_reference=dict(pairs=ref_n, cpu_s=ref_s),
                                   every_pair=dict(pairs=all_n, cpu_s=all_s)),
                          threads=1, machine=platform.processor() or platform.machine(),
                          python=platform.python_version(),
                          **{p: version(p) for p in ('numpy', 'pandas', 'scipy', 'statsmodels')})))
