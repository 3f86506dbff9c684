"""The arithmetic of training, against committed numbers. Whoever breaks this test mends the code or raises ENGINE: that
of `recipes` for classifiers, of `clip` for models of pairs, of `models` for the mini models; then `python
tests/test_witness.py` writes the numbers again. Finished points and models are found by a key that holds ENGINE and
not the code, so a change of arithmetic that nobody noticed would mix numbers of two engines."""
import json, os, platform, sys, tempfile
from pathlib import Path
import pytest

FILE = Path(__file__).with_name('witness.json')
# real set, synthetic set, images of each, seed, multiplier of the training time
POINTS = [('digits', '', 10, 0, 0, 1), ('', 'rendered', 0, 20, 1, 1), ('digits', '', 50, 0, 0, 2),
          ('digits', 'rendered', 30, 20, 0, 1)]
MINIS = {'mini_sd': ('vae', 'unet'), 'mini_if': ('unet',), 'mini_muse': ('vq', 'transformer')}

def machine():
    "What decides the last bits: the processor and the libraries."
    from importlib.metadata import version
    import torch
    try:
        lines = [line.split(':') for line in open('/proc/cpuinfo') if ':' in line]
        about = {k.strip(): v.strip() for k, v in reversed(lines)}
        cpu = ', '.join(f'{k} {about[k]}' for k in ('model name', 'cpu family', 'model'))
    except (OSError, KeyError):
        cpu = platform.processor()
    # a virtual machine often says less than its processor is: two that are called "AMD EPYC" differ in what they can do
    cpu = f'{cpu}, {torch.backends.cpu.get_cpu_capability()}'
    packages = ('torch', 'timm', 'open_clip_torch', 'diffusers', 'transformers', 'numpy')
    return dict(cpu=cpu, arch=platform.machine(), **{p: version(p) for p in packages})

def points(study):
    "Loss and accuracy of four points on every split."
    from synthscale.classify import run_point
    from synthscale.curves import Point
    out = {}
    for real, synthetic, n_real, n_synthetic, seed, multiplier in POINTS:
        share = .5 if n_real and n_synthetic else None
        point = Point('convnext_digits', real, synthetic, n_real, n_synthetic, seed, multiplier, share)
        r = run_point(study.dir, point)
        name = '+'.join(filter(None, (real, synthetic)))
        key = f'{name} {n_real}+{n_synthetic} seed {seed} x{multiplier}'
        out[key] = {t: [m['loss'], m['ece']] for t, m in r['tests'].items()}
    return out

def minis(study):
    "Sums over the weights of each mini model after 20 steps."
    import torch
    from safetensors.torch import load_file
    from synthscale.mini_models import MINIS as MAKE
    from synthscale.shards import load_set
    torch.set_num_threads(1)
    images, out = load_set(study.set_dir('rendered'), 'train'), {}
    for name, parts in MINIS.items():
        spec = study.models[name]
        short = {p: getattr(spec, p).model_copy(update={'steps': 20}) for p in parts}
        with tempfile.TemporaryDirectory() as d:
            MAKE[name](images, spec.model_copy(update=short), 7, Path(d)/'work', Path(d)/'out')
            for f in sorted(Path(d, 'out').rglob('*.safetensors')):
                sums = [float(sum(w.double().abs().sum() for w in load_file(f).values())),
                        float(sum((w.double()**2).sum() for w in load_file(f).values()))]
                out[f'{name}/{f.parent.name}'] = sums
    return out

def pairs():
    "Zero-shot and retrieval losses of two models of pairs."
    from ruamel.yaml import YAML
    from synthscale.clip import run_point
    from synthscale.curves import Point
    from synthscale.pools import write_pool
    from synthscale.smoke import smoke_params, smoke_study, with_pairs
    from synthscale.study import Study
    study, out = Study(smoke_study('data')), {}
    with open(study.dir/'params.yaml', 'w') as f:
        YAML().dump(with_pairs(smoke_params()), f)
    write_pool(Study(study.dir), 'words')
    for n, seed in ((40, 0), (80, 1)):
        r = run_point(study.dir, Point('small', 'rendered', '', n, 0, seed, captions='words'))
        found = {t: [m['loss'], m['ece']] for t, m in r['tests'].items()}
        out[f'{n} seed {seed}'] = found | {t: [m['loss']] for t, m in r['retrieval'].items()}
    return out

def measured():
    "The numbers of the code as it is."
    os.environ['OMP_NUM_THREADS'] = '1'
    from synthscale import clip, models, recipes
    from synthscale.smoke import smoke_study
    from synthscale.study import Study
    study = Study(smoke_study('data'))
    engines = dict(recipes=recipes.ENGINE, clip=clip.ENGINE, models=models.ENGINE)
    return dict(machine=machine(), engines=engines, points=points(study), pairs=pairs(), models=minis(study))

def flat(d, at=''):
    "Nested dicts and lists of numbers as one dict."
    out = {}
    for name, x in d.items() if isinstance(d, dict) else enumerate(d):
        out |= flat(x, f'{at}{name}: ') if isinstance(x, (dict, list)) else {f'{at}{name}': x}
    return out

@pytest.mark.parametrize('what', ['points', 'pairs', 'models'])
def test_arithmetic_is_that_of_the_committed_numbers(what):
    "Equal to the bit on the machine type that made them, to a thousandth elsewhere."
    then, now = json.loads(FILE.read_text()), now_()
    engine = {'points': 'recipes', 'pairs': 'clip', 'models': 'models'}[what]
    assert then['engines'][engine] == now['engines'][engine], \
        'ENGINE was raised: python tests/test_witness.py writes the numbers again'
    a, b, same = flat(then[what]), flat(now[what]), then['machine'] == now['machine']
    assert a.keys() == b.keys()
    def differs(k):
        return a[k] != b[k] if same else abs(a[k]-b[k]) > 1e-3*max(abs(a[k]), 1)
    wrong = [f'{k}: {a[k]} -> {b[k]}' for k in a if differs(k)]
    assert not wrong, (f'training has other numbers than before ({len(wrong)} of {len(a)}, e.g. {wrong[0]}): mend the '
                       f'code, or raise ENGINE in synthscale.{engine} and run python tests/test_witness.py')

def now_(found={}):
    "Measured once for all tests."
    if not found:
        found.update(measured())
    return found

if __name__ == '__main__':
    FILE.write_text(json.dumps(measured(), indent=1)+'\n')
    print(FILE, file=sys.stderr)
