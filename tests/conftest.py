"Fixtures: a smoke study as a git and DVC repository of its own, run once, and cheap copies of it to break."
import os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from filelock import FileLock
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
WAIT = 3600      # seconds, for commands that take a few: a slow or busy machine fails no test, only what hangs does
os.environ.setdefault('OMP_NUM_THREADS', '1')      # tests run beside each other on two cores
os.environ['DVC_NO_ANALYTICS'] = '1'

def environment():
    """The environment of a user: this interpreter's `python` first on the path, and git that knows who commits. Points
    are trained in the stage's own process, as on one core: what few there are would not pay for starting workers."""
    bin_ = str(Path(sys.executable).parent)
    who = {f'GIT_{w}_{k}': v for w in ('AUTHOR', 'COMMITTER')
           for k, v in (('NAME', 'test'), ('EMAIL', 'test@example.org'))}
    own = {'PATH': f"{bin_}{os.pathsep}{os.environ['PATH']}", 'PYTHONPATH': '', 'PYTHONDONTWRITEBYTECODE': ''}
    return {**os.environ, **who, **own, 'LOKY_MAX_CPU_COUNT': '1'}

def sh(cmd, cwd, ok=True, timeout=WAIT):
    """Run a command; returns its output; fails the test with that output if it fails (with ok=False, if it does not;
    with ok=None, never)."""
    r = subprocess.run(cmd, cwd=cwd, shell=isinstance(cmd, str), capture_output=True, text=True, timeout=timeout,
                       env=environment())
    out = r.stdout+r.stderr
    assert ok is None or (r.returncode == 0) == ok, f'{cmd} gave {r.returncode}:\n{out[-4000:]}'
    return out

def load(path):
    return YAML(typ='safe').load(Path(path).read_text())

def dump(data, path):
    with open(path, 'w') as f:
        YAML().dump(data, f)

def edit(folder, change):
    "Change params.yaml in place."
    p = load(folder/'params.yaml')
    change(p)
    dump(p, folder/'params.yaml')

def repo_files():
    "What a commit of the working tree would hold."
    r = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, text=True,
                       check=True)
    return [n for n in r.stdout.split('\0') if n and (ROOT/n).is_file()]

def copy_repo(to, skip=('remote/', 'studies/', 'results/', 'figures/', 'dvc.lock', 'data.dvc', 'LOG.md')):
    "The working tree's own files in a new folder."
    for n in repo_files():
        if n.startswith(skip): continue
        (to/n).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/n, to/n)
    return to

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Slow tests first, in file order: one worker runs the study that they share while the other one runs the rest.
    A campaign is slow, too."""
    for i in items:
        if i.get_closest_marker('campaign'):
            i.add_marker('slow')
    items.sort(key=lambda i: i.get_closest_marker('slow') is None)

@pytest.fixture(scope='session')
def finished(tmp_path_factory, worker_id):
    """The repository with the smoke study, run from nothing, committed and pushed to its remote: made by the first
    worker that asks, read by all."""
    base = tmp_path_factory.getbasetemp()
    d = (base if worker_id == 'master' else base.parent)/'finished'/'repo'
    with FileLock(d.parent.with_suffix('.lock')):
        if not (d.parent/'first.log').exists():
            make_finished(d)
    return d

@pytest.fixture
def ray_turn(tmp_path_factory, worker_id):
    """One Ray at a time on the two cores that tests share: a part of it that waits for another gives up after 15
    seconds."""
    base = tmp_path_factory.getbasetemp()
    with FileLock((base if worker_id == 'master' else base.parent)/'ray.lock'):
        yield

def finished_params():
    "The smoke study with one source and three curves: what loads torch takes seconds, however little it does."
    from synthscale.smoke import smoke_params
    p = smoke_params()
    p['models'] = {'mini_sd': p['models']['mini_sd']}      # the others are trained by their notebook's lesson
    for part in ('vae', 'unet'):
        p['models']['mini_sd'][part]['steps'] = 20
    p['recipes']['convnext_digits']['samples_seen_at_100'] = 320
    p['data']['shard_size'] = 1000        # one shard per source, so that no stage starts Ray, which has its own tests
    p['generate']['sources'] = {'names_g2': p['generate']['sources']['names_g2']}
    del p['evaluators']['in_domain_classifier']
    p['quality']['in_domain_evaluator'] = 'real_classifier'               # one plays both parts
    p['quality']['sets'], p['filters'], p['merged'] = {}, {}, {}          # test_pipeline adds one of each
    p['classify'] |= dict(curves={'digits': p['classify']['curves']['digits']}, compute_seeds=1)
    choice = dict(among=['digits', 'names_g2'], n_images=80, selected='names_g2')
    p['laws'] |= dict(compare=[['digits', 'names_g2']], model_selection={'images': choice})
    p['report'] |= dict(scaling=['digits', 'names_g2'], samples=['digits', 'names_g2'])
    return p

def make_finished(d):
    from synthscale.smoke import make_inputs
    shutil.rmtree(d, ignore_errors=True)                # a half-made one, of a worker that failed
    copy_repo(d)
    dump(finished_params(), d/'params.yaml')
    make_inputs(d/'data')
    sh('git init -q && dvc add -q data && git add -A && git commit -qm inputs', d)
    first = sh('dvc repro', d)
    sh('dvc push -q && git add -A && git commit -qm run', d)
    (d.parent/'first.log').write_text(first)

@pytest.fixture
def repo(finished, tmp_path):
    "A copy of the finished repository that a test may break."
    shutil.copytree(finished, tmp_path/'repo', symlinks=True)
    return tmp_path/'repo'

def ran(output):
    "The stages that a `dvc repro` ran."
    return set(re.findall(r"^Running stage '([^']+)'", output, re.M))

def forget(d, stages):
    "As if these stages had never run: neither in dvc.lock nor in DVC's memory of runs."
    lock = load(d/'dvc.lock')
    lock['stages'] = {k: v for k, v in lock['stages'].items() if k.split('@')[0] not in stages}
    with open(d/'dvc.lock', 'w') as f:
        YAML().dump(lock, f)
    shutil.rmtree(d/'.dvc'/'cache'/'runs', ignore_errors=True)
    (d/'build'/'dvc.lock.good').unlink(missing_ok=True)       # the copy would say that the last stages were lost
