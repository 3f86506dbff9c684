"""How often the verdict of `your_task` is wrong where the truth is known. Prints one JSON line.

    python benchmarks/verdicts.py digits [--null 40] [--help-trials 20]
    python benchmarks/verdicts.py DIR/cifar10_jpg.zip --weights FILE        # a probe on Lite0's features

A trial is a whole study of its own, in a temporary folder: photographs, a validation split and a test split drawn
anew, two candidates, and the verdict as `synthscale your_task` gives it. How many photographs there are, to select on
and to test on, is drawn, too: 5 to 20 of each class, 3 or 15, and 2 to 50. In a trial of the first kind no candidate
can help, in one of the second kind one can:
- copies: the training photographs again (nothing new)
- shuffled: other real photographs under a random permutation of their labels
- shifted: other real photographs, each class under the next one's name
- noise: pixels drawn at random, of every class alike
- all: one of each of these four, of which the best is chosen
- more: other real photographs with their own labels, beside one of the four above
A verdict `generate` is wrong in all but the last, and there it is right if the recommended set is the right one.
With --keep FILE finished trials are kept, and a killed run goes on.
"""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import argparse, contextlib, io, json, platform, shutil, tempfile, time, zipfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
import numpy as np
from joblib import Parallel, delayed
from PIL import Image
from scipy.stats import beta

ROOT = Path(__file__).resolve().parents[1]
HARMLESS = ('copies', 'shuffled', 'shifted', 'noise')
NULL = ('copies', 'all', 'noise', 'copies', 'shuffled', 'copies', 'shifted')     # beside copies the truth is 1

# ---- photographs

def digits():
    "All handwritten digits of the embedded study: images, labels, class names."
    from synthscale.shards import load_set
    from synthscale.study import Study
    s = Study(ROOT)
    every = load_set(s.set_dir('mnist'))
    return every.images[..., 0], every.labels, s.study.classes

def folder_zip(path, per_class):
    "The first images of each class of a zip of PART/CLASS/NAME."
    images, labels, seen = [], [], Counter()
    with zipfile.ZipFile(path) as z:
        names = sorted(n for n in z.namelist() if n.lower().endswith(('.jpg', '.png')) and n.count('/') > 1)
        classes = sorted({n.split('/')[-2] for n in names})
        for n in names:
            c = n.split('/')[-2]
            if seen[c] >= per_class: continue
            seen[c] += 1
            images.append(np.asarray(Image.open(io.BytesIO(z.read(n))).convert('RGB')))
            labels.append(classes.index(c))
    return np.stack(images), np.array(labels), classes

# ---- one trial

def candidate(kind, rng, images, labels, photos, others, n_classes):
    "Images and labels of a candidate of a kind."
    if kind == 'copies': return images[photos], labels[photos]
    y = labels[others]
    if kind == 'noise': return rng.integers(0, 256, images[others].shape, np.uint8), y
    if kind == 'shifted': return images[others], (y+1) % n_classes
    if kind == 'shuffled': return images[others], rng.permutation(y)
    return images[others], y

def drawn(rng, labels, n_classes, sizes):
    "Disjoint positions, as many of each class, one array a size."
    each = [rng.permutation(np.flatnonzero(labels == c)) for c in range(n_classes)]
    ends = np.cumsum([0, *sizes])
    return [np.concatenate([e[a:b] for e in each]) for a, b in zip(ends, ends[1:])]

def write(folder, images, labels, classes):
    "A folder of PNGs for each class."
    for i, (x, y) in enumerate(zip(images, labels)):
        to = folder/classes[y]/f'{i:05d}.png'
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(to, compress_level=1)

def params(kinds, classes, side, channels, recipe, models, n, fresh):
    "The study of one trial."
    made = {k: dict(type='imagefolder', input=k, synthetic=True, fewer_classes=True) for k in kinds}
    return dict(
        root=str(ROOT), study=dict(name='trial', classes=classes), generate=dict(sources={}), models=models,
        data=dict(root='.', image_size=side, channels=channels, near_bits=0, sets=dict(photos=dict(
            type='imagefolder', input='photos', splits=dict(train='train', val='val', test='test'))) | made),
        recipes=dict(mine=recipe), your_task=dict(decision=dict(
            photos='photos', candidates=list(kinds), recipes=['mine'], test_split='test', n_photos=[n//2, n],
            n_more=[4*n], seeds=3, fresh_seeds=fresh)),
        classify=dict(eval=dict(set='photos', validation='val', test_splits=['test'], ood_set='photos',
                                in_domain_set='photos'), recipe='mine', compute_seeds=0,
                      curves=dict(photos=dict(set='photos', n_images=[n]))))

def trial(seed, kind, data, recipe, models, fresh):
    "The verdict of one study whose truth is known."
    from synthscale.data import build_set
    from synthscale.decision import verdict_of
    from synthscale.study import Study
    from synthscale.your_task import run_task
    import torch
    torch.set_num_threads(1)
    images, labels, classes = data
    rng, began = np.random.default_rng(seed), time.time()
    per = int(rng.choice([5, 10, 20]))
    selected, tested = int(rng.choice([3, 15])), int(rng.choice([2, 5, 50]))
    photos, val, test, others = drawn(rng, labels, len(classes), (per, selected, tested, 4*per))
    kinds = {'all': HARMLESS, 'more': ('more', str(rng.choice(HARMLESS)))}.get(kind, (kind, kind))
    named = [f'{k}_{i}' for i, k in enumerate(kinds)]
    folder = Path(tempfile.mkdtemp(prefix='trial-'))
    try:
        for split, i in (('train', photos), ('val', val), ('test', test)):
            write(folder/'photos'/split, images[i], labels[i], classes)
        for name, k in zip(named, kinds):
            write(folder/name, *candidate(k, rng, images, labels, photos, others, len(classes)), classes)
        channels = 1 if images.ndim == 3 else 3
        p = params(named, classes, images.shape[1], channels, recipe, models, len(photos), fresh)
        (folder/'params.yaml').write_text(json.dumps(p))
        study = Study(folder)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            for s in study.data.sets:
                build_set(study, s)
            out = run_task(study, 'decision', 1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    g = out['gain']
    told = verdict_of({c['control']: c for c in out['controls']})
    return dict(seed=seed, kind=kind, n_photos=len(photos), n_validation=len(val), n_test=len(test),
                verdict=out['verdict'], chosen=out['source']['set'], n_synthetic=out['source']['n_synthetic'],
                ratio=g['ratio'], ci_lo=g['ci_lo'], ci_hi=g['ci_hi'], doubt=out['doubt'], intervals=told,
                controls={c['control']: [round(c[k], 4) for k in ('ratio', 'ci_lo', 'ci_hi')] for c in out['controls']},
                without_temperature=[round(v, 4) for v in g['without_temperature'].values()],
                seconds=round(time.time()-began, 1))

# ---- the campaign

def interval(k, n):
    "Clopper and Pearson's 95 % interval of a share."
    lo, hi = beta.ppf(.025, k, n-k+1) if k else 0., beta.ppf(.975, k+1, n-k) if k < n else 1.
    return [round(float(lo), 4), round(float(hi), 4)]

def counts(rows, key):
    "How often each verdict is given, by a key."
    return {str(k): dict(Counter(r['verdict'] for r in rows if r[key] == k)) for k in sorted({r[key] for r in rows})}

def summary(rows):
    "Counts by kind and by the number of test images, and the two shares that matter."
    null, more = ([r for r in rows if (r['kind'] == 'more') == m] for m in (False, True))
    wrong = sum(r['verdict'] == 'generate' for r in null)
    found = sum(r['verdict'] == 'generate' and r['chosen'].startswith('more') for r in more)
    misled = sum(r['verdict'] == 'generate' and not r['chosen'].startswith('more') for r in more)
    thin = [r for r in rows if r['doubt']]
    return dict(by_kind=counts(rows, 'kind'), null_by_test_images=counts(null, 'n_test'),
                help_by_test_images=counts(more, 'n_test'), doubted=len(thin), null_trials=len(null),
                doubted_wrong_generate=sum(r['intervals'] == 'generate' for r in thin if r['kind'] != 'more'),
                wrong_generate=wrong, wrong_share=wrong/max(len(null), 1), wrong_interval=interval(wrong, len(null)),
                help_trials=len(more), found=found, wrong_set=misled, found_share=found/max(len(more), 1),
                found_interval=interval(found, len(more)))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('photos', help="digits, or a zip of PART/CLASS/NAME")
    p.add_argument('--weights', help='file of weights of tf_efficientnet_lite0: a probe on its features')
    p.add_argument('--null', type=int, default=40, help='trials in which nothing helps (default: %(default)s)')
    p.add_argument('--help-trials', type=int, default=20, help='trials in which something does (default: %(default)s)')
    p.add_argument('--fresh', type=int, default=6, help='seeds of the choice measured again (default: %(default)s)')
    p.add_argument('--jobs', type=int, default=2, help='trials beside each other (default: %(default)s)')
    p.add_argument('--keep', help='file of finished trials')
    p.add_argument('--look-into', type=int, nargs='+', metavar='SEED', help='only these trials, each with its controls')
    a = p.parse_args()
    data = digits() if a.photos == 'digits' else folder_zip(a.photos, 300)
    adamw = dict(name='adamw', lr=.003, weight_decay=.5)
    base = dict(reference='benchmarks/verdicts.py', samples_seen_at_100=6400, samples_seen_power=.3, batch_size=64,
                optimizer=adamw)
    models, recipe = {}, base | dict(label_smoothing=.05, augment=dict(affine=1.5), arch=dict(
        name='convnext_atto', kwargs=dict(depths=[1, 1, 1, 1], dims=[8, 32, 48, 64], patch_size=1, kernel_sizes=3,
                                          act_layer='relu')))
    if a.weights:
        from synthscale.study import file_sha256
        models = dict(lite0=dict(type='backbone', input=a.weights, arch='tf_efficientnet_lite0', names='by_order',
                                 mean=[.5]*3, std=[.5]*3, input_size=224, n_classes=1000, sha256=file_sha256(a.weights),
                                 licence='Apache-2.0', origin='ImageNet-1k'))
        recipe = base | dict(start={'from': 'lite0', 'train': 'head'}, input_size=64)
    plan = [(i, NULL[i % len(NULL)]) for i in range(a.null)]
    for i in range(a.help_trials):                       # among them, so that a killed campaign has some of both
        plan.insert(round((i+1)*len(plan)/a.help_trials), (1000+i, 'more'))
    if a.look_into:
        looked = [trial(s, k, data, recipe, models, a.fresh) for s, k in plan if s in a.look_into]
        print(json.dumps(dict(benchmark='verdicts_looked_into', data=Path(a.photos).name, trials=looked)))
        return
    kept = Path(a.keep) if a.keep else None
    rows = [json.loads(x) for x in kept.read_text().splitlines()] if kept and kept.exists() else []
    seen, began = {r['seed'] for r in rows}, time.time()
    jobs = (delayed(trial)(s, k, data, recipe, models, a.fresh) for s, k in plan if s not in seen)
    for r in Parallel(n_jobs=a.jobs, return_as='generator_unordered')(jobs):
        rows.append(r)
        if kept:
            with kept.open('a') as f:
                f.write(json.dumps(r)+'\n')
    print(json.dumps(dict(
        benchmark='verdicts', data=Path(a.photos).name, recipe='probe' if a.weights else 'scratch', seeds=3,
        fresh_seeds=a.fresh, validation_images=sorted({r['n_validation'] for r in rows}),
        test_images=sorted({r['n_test'] for r in rows}), **summary(rows),
        trial_seconds=sum(r['seconds'] for r in rows), wall_seconds=round(time.time()-began, 1), threads=1, jobs=a.jobs,
        cores=os.cpu_count(), machine=platform.machine(), python=platform.python_version(),
        versions={k: version(k) for k in ('torch', 'timm', 'numpy', 'scipy')})))

if __name__ == '__main__':
    main()
