"Fixtures: a smoke study as a git and DVC repository of its own, run once, and cheap copies of it to break."
import os, shutil, subprocess, sys
from pathlib import Path
import pytest
from filelock import FileLock
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault('OMP_NUM_THREADS', '1')      # tests run beside each other on two cores
os.environ['DVC_NO_ANALYTICS'] = '1'

def environment():
    "The environment of a user: this interpreter's `python` first on the path, and git that knows who commits."
    bin_ = str(Path(sys.executable).parent)
    who = {f'GIT_{w}_{k}': v for w in ('AUTHOR', 'COMMITTER') for k, v in (('NAME', 'test'), ('EMAIL', 'test@example.org'))}
    return {**os.environ, **who, 'PATH': f"{bin_}{os.pathsep}{os.environ['PATH']}", 'PYTHONPATH': ''}

def sh(cmd, cwd, ok=True, timeout=600):
    "Run a command; returns its output; fails the test with that output if it fails (or, with ok=False, if it does not)."
    r = subprocess.run(cmd, cwd=cwd, shell=isinstance(cmd, str), capture_output=True, text=True, timeout=timeout, env=environment())
    out = r.stdout+r.stderr
    if ok is not None: assert (r.returncode == 0) == ok, f'{cmd} gave {r.returncode}:\n{out[-4000:]}'
    return out

def load(path): return YAML(typ='safe').load(Path(path).read_text())

def dump(data, path):
    with open(path, 'w') as f: YAML().dump(data, f)

def edit(folder, change):
    "Change params.yaml in place."
    p = load(folder/'params.yaml')
    change(p)
    dump(p, folder/'params.yaml')

def repo_files():
    "What a commit of the working tree would hold."
    names = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0')
    return [n for n in names if n and (ROOT/n).is_file()]

def copy_repo(to, skip=('remote/', 'studies/', 'results/', 'figures/', 'dvc.lock', 'data.dvc', 'LOG.md')):
    "The working tree's own files in a new folder."
    for n in repo_files():
        if n.startswith(skip): continue
        (to/n).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/n, to/n)
    return to

def pytest_collection_modifyitems(items):
    "Slow tests first, in file order: one worker runs the study that they share while the other one runs the rest."
    items.sort(key=lambda i: i.get_closest_marker('slow') is None)

@pytest.fixture(scope='session')
def finished(tmp_path_factory, worker_id):
    "The repository with the smoke study, run from nothing, committed and pushed to its remote: made by the first worker that asks, read by all."
    base = tmp_path_factory.getbasetemp()
    d = (base if worker_id == 'master' else base.parent)/'finished'/'repo'
    with FileLock(d.parent.with_suffix('.lock')):
        if not (d.parent/'first.log').exists(): make_finished(d)
    return d

def make_finished(d):
    from synthscale.smoke import make_inputs, smoke_params
    shutil.rmtree(d, ignore_errors=True)                # a half-made one, of a worker that failed
    copy_repo(d)
    p = smoke_params()
    p['models'] = {'mini_sd': p['models']['mini_sd']}      # the others are trained by their notebook's lesson
    p['data']['shard_size'] = 1000                         # one shard a source, so that no stage starts Ray, which has tests of its own
    dump(p, d/'params.yaml')
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
    import re
    return set(re.findall(r"^Running stage '([^']+)'", output, re.M))

@pytest.fixture
def stages_ran(): return ran
