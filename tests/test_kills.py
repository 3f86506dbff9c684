"""DVC killed at any moment, its own writes among them: `synthscale doctor` and `synthscale repro` go on, without a hand,
to the same bytes. Every kill is SIGKILL of the whole process group. As a program: `python tests/test_kills.py REPO`
runs the campaign on copies of a finished smoke study and prints its counts as one JSON line."""
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import psutil, pytest
from conftest import WAIT, environment, load, ran, sh
from ruamel.yaml import YAML
from synthscale.doctor import cut, damage, dvc_files, good_copy, keep_good
from synthscale.study import Study, StudyError

SYNTHSCALE = [sys.executable, '-m', 'synthscale.run']
AGGREGATES = {'results', 'laws', 'report'}
MADE = ('build', 'runs', 'sets', 'models', 'evaluators', 'results', 'figures', '.dvc/cache/runs', 'dvc.lock')
SAME = ('runs/classify/digits.ipynb', 'runs/laws/laws.ipynb', 'sets/rendered/manifest.parquet',
        'sets/names_g2/manifest.parquet', 'results/headline.json')

# `dvc` that kills its process group in the middle of one write: of the file named, the n-th time, after so many letters.
TORN = """
import os, signal, sys
from dvc_objects.fs.base import FileSystem
name, nth, letters = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
plain, seen = FileSystem.open, []

class Dying:
    def __init__(self, f): self.f, self.left = f, letters
    def __getattr__(self, k): return getattr(self.f, k)
    def __enter__(self): return self
    def __exit__(self, *e): self.f.close()
    def write(self, text):
        self.f.write(text[:self.left])
        self.left -= len(text)
        if self.left > 0: return len(text)
        self.f.flush()
        os.killpg(0, signal.SIGKILL)

def torn(self, path, mode='r', **how):
    f = plain(self, path, mode, **how)
    if not mode.startswith('w') or os.path.basename(path) != name: return f
    seen.append(path)
    return Dying(f) if len(seen) == nth else f

FileSystem.open = torn
from dvc.cli import main
sys.exit(main(sys.argv[4:]))
"""

def same_files(d):
    "What a study made, but for what its stages cost."
    tables = [p for p in sorted((d/'results').glob('*.csv')) if p.name != 'costs.csv']
    return {str(p.relative_to(d)): p.read_bytes() for p in [*tables, *(d/f for f in SAME)]}

def alive(group):
    "Whether a process of a group runs; one that nobody has waited for yet does not."
    for p in psutil.process_iter():
        try:
            if os.getpgid(p.pid) == group and p.status() != psutil.STATUS_ZOMBIE: return True
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return False

def killed(d, cmd, seconds=None):
    """Run a command as a process group of its own and kill it whole after so many seconds, or let it kill itself.
    Returns whether it was killed, and what it said."""
    with open(d.parent/'said.txt', 'w+') as said:
        p = subprocess.Popen(cmd, cwd=d, env=environment() | {'PYTHONUNBUFFERED': '1'}, stdout=said, stderr=said,
                             start_new_session=True)
        until = time.time()+(seconds or WAIT)
        while p.poll() is None and time.time() < until:
            time.sleep(.02)
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        while alive(p.pid):                  # kernels have groups of their own and end by themselves
            time.sleep(.05)
    return p.returncode == -signal.SIGKILL, (d.parent/'said.txt').read_text()

def state(d):
    "What is half-written now, in words."
    what, found = damage(Study(d, {}), d/'dvc.lock'), []
    if what:
        kind = next((k for k in ('it is empty', 'it ends within', 'are lost') if k in what), 'hashes are lost')
        found.append(f'dvc.lock: {kind}')
    rwlock = d/'.dvc'/'tmp'/'rwlock'
    try:
        json.loads(rwlock.read_text() if rwlock.exists() else '{}')
    except ValueError:
        found.append('rwlock')
    return found

def one_kill(d, kind, rng):
    "Doctor, then a `repro` that is killed; returns whether it was, and what it left half-written."
    if kind == 'synthscale':
        was, said = killed(d, [*SYNTHSCALE, 'repro', '--no-run-cache'], rng.uniform(2, 14))
        return was, state(d), said
    sh([*SYNTHSCALE, 'doctor'], d)
    cmd, seconds = [sys.executable, '-m', 'dvc', 'repro'], rng.uniform(2, 14)
    if kind in ('dvc.lock', 'rwlock'):
        letters = rng.choice([1, 1, 30, 200, 900, 3000]) if kind == 'dvc.lock' else rng.choice([1, 1, 12])
        cmd, seconds = [sys.executable, '-c', TORN, kind, str(rng.randint(1, 3)), str(letters), 'repro'], None
    was, said = killed(d, cmd, seconds)
    return was, state(d), said

def chain(d, kinds, rng, left):
    "Kill after kill in one study, and then to its end. Returns the kills that happened."
    n = 0
    for kind in kinds:
        was, found, said = one_kill(d, kind, rng)
        n += was
        for f in found:
            left[f] = left.get(f, 0)+1
        assert was or 'up to date' in said or 'report' in ran(said), said[-3000:]
    out = sh([*SYNTHSCALE, 'repro'], d)
    assert not state(d), out
    assert ran(sh('dvc repro', d)) == set()
    return n

def forget(d, stages):
    "As if these stages had never run."
    lock = load(d/'dvc.lock')
    lock['stages'] = {k: v for k, v in lock['stages'].items() if k.split('@')[0] not in stages}
    with open(d/'dvc.lock', 'w') as f:
        YAML().dump(lock, f)
    for p in ('build/dvc.lock.good', '.dvc/cache/runs', 'results'):
        p = d/p
        shutil.rmtree(p) if p.is_dir() else p.unlink()

KINDS = ['dvc']*10+['synthscale']*8+['dvc.lock']*8+['rwlock']*4         # 30 kills, 12 aimed at DVC's own writes

def campaign(finished, work, chains=5):
    "30 kills in a few chains, each of the whole study: three from nothing, the others restore from the run cache."
    rng, kinds, left, n, same = random.Random(15), list(KINDS), {}, 0, 0
    rng.shuffle(kinds)
    want, began = same_files(finished), time.time()
    for i in range(chains):
        d = work/f'chain{i}'/'repo'
        shutil.copytree(finished, d, symlinks=True)
        for p in MADE if i < 3 else [m for m in MADE if m != '.dvc/cache/runs']:
            sh(f'rm -rf {p}', d)
        n += chain(d, kinds[i::chains], rng, left)
        same += same_files(d) == want
        print(f'chain {i}: {n} kills, {same} same, {left}', file=sys.stderr, flush=True)
    return dict(kills=n, aimed=12, chains=chains, finished=chains, same_bytes=same, left_half_written=left,
                wall_s=round(time.time()-began), kinds={k: KINDS.count(k) for k in dict.fromkeys(KINDS)})

@pytest.mark.campaign
def test_thirty_kills_of_the_whole_pipeline(finished, tmp_path):
    counts = campaign(finished, tmp_path)
    assert counts['same_bytes'] == counts['chains'] and counts['kills'] >= 28, counts

@pytest.mark.slow
def test_three_kills_two_of_them_aimed_at_what_dvc_writes(repo):
    want, left, rng = same_files(repo), {}, random.Random(0)
    forget(repo, AGGREGATES)
    assert chain(repo, ['dvc.lock', 'rwlock', 'dvc'], rng, left) >= 2
    assert left and same_files(repo) == want

if __name__ == '__main__':
    print(json.dumps(campaign(Path(sys.argv[1]), Path(sys.argv[2]))))
