"""How checks, orders and the reading of a few images grow with images and classes, old way against new. One JSON line.

    python benchmarks/scale.py [--rows 10000 100000 1000000] [--classes 10 1000 20000] [--images 20000]

`old` is what stood here before (images times classes), run where it takes at most 2e7 comparisons, else null.
Growth is the exponent of seconds in rows between the two largest sizes at each number of classes: 1 is linear.
"""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')
import argparse, json, platform, tempfile, time
from importlib.metadata import version
import numpy as np
import pandas as pd
from synthscale import shards
from synthscale.filters import repeats
from synthscale.prompts import check_prompts
from synthscale.shards import balanced_order, check_manifest, check_set, load_set, own_order, write_set

def seconds(f, *a):
    start = time.perf_counter()
    f(*a)
    return round(time.perf_counter()-start, 4)

def old_check(m, classes):
    for c in classes:
        assert c in set(m['class'])

def old_order(labels):
    rng, rank = np.random.default_rng(0), np.empty(len(labels), np.int64)
    for c in np.unique(labels):
        rank[rng.permutation(np.flatnonzero(labels == c))] = np.arange((labels == c).sum())
    return np.lexsort((rng.random((rank.max()+1, labels.max()+1))[rank, labels], rank))

def tables(n, k):
    "A manifest of n rows and k classes, checked and ordered."
    classes, labels = [f'c{i}' for i in range(k)], np.arange(n) % k
    text = np.arange(n).astype(str)
    m = pd.DataFrame({'key': [f'train-{i:07d}' for i in range(n)], 'split': 'train', 'class': np.array(classes)[labels],
                      'label': labels, 'caption': '', 'shard': [f'a-{i//4000:06d}.tar' for i in range(n)],
                      'sha256': text, 'shard_sha256': 'x', 'prompt': text})
    small = n*k <= 2*10**7
    return dict(rows=n, classes=k, check_manifest=seconds(check_manifest, m, 'a'),
                check_set=seconds(check_set, m, 'a', classes), check_prompts=seconds(check_prompts, m, 'a', classes),
                balanced_order=seconds(balanced_order, labels, 0), own_order=seconds(own_order, labels, 0),
                old_check_set=seconds(old_check, m, classes) if small else None,
                old_balanced_order=seconds(old_order, labels) if small else None)

def old_repeats(shapes, bits):
    kept = np.empty(len(shapes), np.uint64)
    k = 0
    for s in shapes:
        if k and np.bitwise_count(kept[:k] ^ s).min() <= bits: continue
        kept[k], k = s, k+1

def near(n):
    "Near repeats among n images of one class."
    shapes = np.random.default_rng(0).integers(0, 2**63, n).astype(np.uint64)
    return dict(images=n, seconds=seconds(repeats, list(range(n)), shapes, np.zeros(n, int), 3),
                old_seconds=seconds(old_repeats, shapes, 3) if n <= 20000 else None)

def reading(n):
    "100 images of a set of n: by themselves, and, as before, out of the whole set, read by tarfile."
    rng = np.random.default_rng(0)
    samples = (dict(split='train', label=i % 10, image=rng.integers(0, 255, (8, 8, 1), np.uint8)) for i in range(n))
    with tempfile.TemporaryDirectory() as d:
        m = write_set(f'{d}/a', samples, [f'c{i}' for i in range(10)])
        some = balanced_order(m.label, 0)[:100]
        new = seconds(lambda: load_set(f'{d}/a', 'train', rows=some))
        fast, shards._own_files = shards._own_files, lambda path: None           # as before, by tarfile
        old = seconds(lambda: load_set(f'{d}/a', 'train').images[some])
        shards._own_files = fast
    return dict(images=n, wanted=100, seconds=new, old_seconds=old)

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--rows', type=int, nargs='+', default=[10000, 100000, 1000000])
    a.add_argument('--classes', type=int, nargs='+', default=[10, 1000, 20000])
    a.add_argument('--images', type=int, nargs='*', default=[20000, 100000])
    a = a.parse_args()
    made = [tables(n, k) for k in a.classes for n in sorted(a.rows) if n >= k]
    growth = {}
    for k in a.classes:
        rows = [r for r in made if r['classes'] == k][-2:]
        if len(rows) < 2: continue
        growth[k] = {c: round(float(np.log(rows[1][c]/rows[0][c])/np.log(rows[1]['rows']/rows[0]['rows'])), 2)
                     for c in ('check_manifest', 'check_set', 'check_prompts', 'balanced_order', 'own_order')}
    print(json.dumps(dict(benchmark='scale', tables=made, growth=growth, reading=[reading(n) for n in a.images],
                          near=[near(n) for n in a.images], threads=1, python=platform.python_version(),
                          **{p: version(p) for p in ('numpy', 'pandas')})))
