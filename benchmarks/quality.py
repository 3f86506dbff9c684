"""Metrics of image sets on the same features: this package's and torch-fidelity's. One JSON line.

    python benchmarks/quality.py [--n 2000 10000] [--d 64 512] [--repeats 3]

Features are float32, as networks give them. This package computes in float64; torch-fidelity in the type that it is
given, so it is timed with both. Each case runs in a process of its own, with one thread: CPU seconds are the least of
the repeats, memory is how far the process's peak rises above what it had with all imports and features in place.
Precision and recall of this package come with density and coverage, which torch-fidelity has not.
"""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, json, platform, resource, subprocess, sys, time
from importlib.metadata import version
import numpy as np

def ours(metric):
    "The metric as a function of real and generated features, arrays."
    from synthscale import feature_metrics as fm
    return {'frechet_distance': fm.frechet_distance, 'kernel_distance': fm.kernel_distance,
            'precision_recall': lambda a, b: list(fm.neighbour_metrics(a, b).values())[:2]}[metric]

def theirs(metric, dtype):
    "The same of torch-fidelity, the one subset of its kernel distance being all images."
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics as of, fid_statistics_to_metric as distance
    from torch_fidelity.metric_kid import kid_features_to_metric as kid
    from torch_fidelity.metric_prc import prc_features_to_metric as prc
    torch.set_num_threads(1)

    def measure(real, generated):
        a, b = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (real, generated))
        if metric == 'frechet_distance': return [*distance(of(a), of(b), False).values()][0]
        if metric == 'precision_recall': return [*prc(b, a, verbose=False).values()][:2]
        return [*kid(a, b, kid_subsets=1, kid_subset_size=len(a), verbose=False).values()][0]
    return measure

def peak():
    "The most memory that this process has held, in MiB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def one(metric, who, n, d, repeats):
    "Seconds, MiB and value of one case."
    rng, times = np.random.default_rng(0), []
    a, b = (rng.normal(m, s, (n, d)).astype(np.float32) for m, s in ((0, 1), (.05, 1.05)))
    measure = ours(metric) if who == 'synthscale' else theirs(metric, who.split()[1])
    measure(a[:20], b[:20])                                                                # imports and caches
    before = peak()
    for _ in range(repeats):
        start = time.process_time()
        value = measure(a, b)
        times.append(time.process_time()-start)
    return dict(cpu_s=round(min(times), 4), mib=round(peak()-before, 1), value=value)

def case(metric, n, d, repeats):
    "All three ways of one case, each in a process of its own."
    out = dict(metric=metric, n=n, d=d)
    for who in ('synthscale', 'torch-fidelity float32', 'torch-fidelity float64'):
        given = [metric, who, str(n), str(d), str(repeats)]
        done = subprocess.run([sys.executable, __file__, '--one', *given], check=True, capture_output=True, text=True)
        out[who] = json.loads(done.stdout)
    return out

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, nargs='+', default=[2000, 10000])
    p.add_argument('--d', type=int, nargs='+', default=[64, 512])
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--one', nargs=5, help=argparse.SUPPRESS)
    g = p.parse_args()
    if g.one:
        print(json.dumps(one(*g.one[:2], *map(int, g.one[2:]))))
        sys.exit()
    cases = [case(m, n, d, g.repeats) for m in ('frechet_distance', 'kernel_distance', 'precision_recall')
             for n in g.n for d in g.d]
    print(json.dumps(dict(benchmark='quality', cases=cases, threads=1,
                          machine=platform.processor() or platform.machine(), python=platform.python_version(),
                          **{q: version(q) for q in ('numpy', 'torch', 'torch-fidelity')})))
