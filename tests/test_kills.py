"""DVC killed at any moment, its own writes among them: `synthscale doctor` and `synthscale repro` go on, without a
hand, to the same bytes. Every kill is SIGKILL of the whole process group. As a program: `python tests/test_kills.py
REPO FOLDER` runs the campaign on copies of a finished smoke study and prints its counts as one JSON line."""
import json, os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import psutil, pytest
from conftest import WAIT, environment, forget, ran, sh
from synthscale.doctor import cut, damage, doctor, good_copy, keep_good, repro
from synthscale.run import one_writer
from synthscale.study import Study, StudyError

SYNTHSCALE = [sys.executable, '-m', 'synthscale.run']
AGGREGATES = {'results', 'laws', 'report'}
MADE = ('build', 'runs', 'sets', 'models', 'evaluators', 'results', 'figures', '.dvc/cache/runs', 'dvc.lock')
SAME = ('runs/classify/digits.ipynb', 'runs/laws/laws.ipynb', 'sets/rendered/manifest.parquet',
        'sets/names_g2/manifest.parquet', 'results/headline.json')

# `dvc` that kills its process group in the middle of a write: of the file named, the n-th time, after so many letters.
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
        letters = rng.choice([0, 1, 30, 200, 900, 3000]) if kind == 'dvc.lock' else rng.choice([0, 1, 12])
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

# ---- what a cut file is, and what none is

LOCK = """schema: '2.0'
stages:
  prepare:
    cmd: python -m synthscale.run prepare
    deps:
    - path: ./nbs
      hash: md5
      md5: f1b97b283843319615db730b193b8308.dir
      size: 893348
      nfiles: 28
    outs:
    - path: build/nbs
      hash: md5
      md5: ce671b51c82f157e4e6e18f1a32548ba.dir
      size: 25594
      nfiles: 12
    - path: build/params.json
      hash: md5
      md5: 51cb933f2a649eab314021bb7d2b1e2b
      size: 12469
  data@digits:
    cmd: python -m synthscale.run data -p name @
    params:
      build/params.json:
        study:
          note: "a long text that goes on
            in the next line"
    outs:
    - path: sets/digits
      hash: md5
      md5: 1a5e3cf6b682d464ab91bc824be65d72.dir
      size: 2591
      nfiles: 3
"""
OUTS = {'prepare': 2, 'data': 1}
DATA = """outs:
- md5: 1a5e3cf6b682d464ab91bc824be65d72.dir
  size: 2591
  nfiles: 3
  hash: md5
  path: data
"""
NEW = LOCK.replace('12469', '12470')               # prepare ran again: what is cut is no beginning of the copy

@pytest.mark.parametrize('text, outs', [(LOCK, OUTS), (NEW, OUTS), (DATA, {})], ids=['same', 'changed', '.dvc'])
def test_a_file_is_cut_wherever_it_is_cut(text, outs):
    good = LOCK if 'schema' in text else text
    assert not cut(text, good, outs) and not cut(text, '', outs)
    assert [n for n in range(len(text)) if not cut(text[:n], good, outs)] == []
    assert cut('\0'*4096, good, outs) and cut(text[:100]+'\0'*100, good, outs)      # as a power failure leaves it

def study(tmp_path, text, good=None):
    "A study with a dvc.lock, in a git and DVC repository, and a copy of the lock that a stage has kept."
    sh('git init -q && dvc init -q', tmp_path)
    (tmp_path/'dvc.yaml').write_text("stages:\n  prepare: {cmd: x, outs: [build/nbs, build/params.json]}\n")
    s = Study(tmp_path, {})
    if good is not None:
        (tmp_path/'build').mkdir()
        good_copy(tmp_path/'dvc.lock').write_text(good)
    if text is not None:
        (tmp_path/'dvc.lock').write_text(text)
    return s

@pytest.mark.parametrize('n', [0, 1, 200, 505, len(LOCK)-1])
def test_the_copy_is_put_back_and_the_damage_kept(tmp_path, n):
    s = study(tmp_path, NEW[:n], LOCK)
    with pytest.raises(StudyError, match='synthscale doctor'):
        keep_good(s)                                               # a stage stops, and leaves the copy as it is
    assert len(doctor(s)) == 1
    assert (tmp_path/'dvc.lock').read_text() == LOCK
    assert (tmp_path/'build'/'dvc.lock.damaged').read_text() == NEW[:n]
    assert doctor(s) == []

def test_with_no_copy_the_last_commit_serves_and_else_dvc_begins_anew(tmp_path):
    s = study(tmp_path, LOCK)
    sh('git add -A && git commit -qm lock', tmp_path)
    (tmp_path/'dvc.lock').write_text(NEW[:300])
    assert 'the last commit' in doctor(s)[0] and (tmp_path/'dvc.lock').read_text() == LOCK
    sh('git rm -q --cached dvc.lock && git commit -qm none', tmp_path)
    (tmp_path/'dvc.lock').write_text(NEW[:300])
    assert 'no whole copy' in doctor(s)[0] and not (tmp_path/'dvc.lock').exists()
    keep_good(s)                                                   # what is kept now is that there is none
    (tmp_path/'dvc.lock').write_text('')
    assert 'none before' in doctor(s)[0] and not (tmp_path/'dvc.lock').exists()

def test_a_damaged_copy_is_not_believed(tmp_path):
    s = study(tmp_path, LOCK[:50], LOCK[:400])
    assert 'no whole copy' in doctor(s)[0]

def test_what_is_whole_or_wrong_in_another_way_is_left(tmp_path):
    s, lock = study(tmp_path, LOCK, LOCK), tmp_path/'dvc.lock'
    shorter = LOCK[:LOCK.index('  data@digits')]
    lock.write_text(shorter)
    sh('git add dvc.lock && git commit -qm old', tmp_path)
    assert doctor(s) == [] and lock.read_text() == shorter         # an older commit, checked out
    conflict = '<<<<<<< HEAD\n'+LOCK+'=======\n'+NEW+'>>>>>>> other\n'
    lock.write_text(conflict)
    with pytest.raises(StudyError, match='does not parse, and not because it was cut'):
        doctor(s)
    keep_good(s)
    assert lock.read_text() == conflict and good_copy(lock).read_text() == LOCK
    lock.unlink()
    assert doctor(s) == [] and not lock.exists()                   # somebody removed it

@pytest.mark.parametrize('text', ['', '{', '{"write": {"a": {"pid"', '[]', 'null', '{"write": []}', '{"other": 1}'])
def test_a_torn_rwlock_goes(tmp_path, text):
    s = study(tmp_path, None)
    rwlock = tmp_path/'.dvc'/'tmp'/'rwlock'
    rwlock.write_text(text)
    assert len(doctor(s)) == 1 and not rwlock.exists() and doctor(s) == []

def test_an_entry_of_another_program_with_the_same_number_goes(tmp_path):
    s = study(tmp_path, None)
    other = subprocess.Popen(['sleep', '600'])
    try:
        entry = {'pid': other.pid, 'cmd': 'dvc repro'}
        (tmp_path/'.dvc'/'tmp'/'rwlock').write_text(json.dumps({'write': {'x': entry}, 'read': {'y': [entry]}}))
        assert len(doctor(s)) == 1
        assert json.loads((tmp_path/'.dvc'/'tmp'/'rwlock').read_text()) == {'write': {}, 'read': {}}
    finally:
        other.kill()
        other.wait()

def test_the_doctor_says_who_is_at_work(tmp_path):
    s = study(tmp_path, '', LOCK)
    code = ("import sys, time, zc.lockfile\nx = zc.lockfile.LockFile('.dvc/tmp/lock')\nprint(1, flush=True)\n"
            "time.sleep(600)")
    other = subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(StudyError, match=f'DVC is at work in .*: process {other.pid}'):
            doctor(s, wait=.5)
    finally:
        other.kill()
        other.wait()
    with one_writer(tmp_path/'build'/'locks'/'laws-laws.lock'):
        with pytest.raises(StudyError, match='laws-laws is running'):
            doctor(s, wait=.5)
        (tmp_path/'dvc.lock').write_text(LOCK)
        assert doctor(s, wait=.5) == []                            # where nothing is wrong, both go on

def test_a_study_without_git_is_told_what_to_do(tmp_path):
    s = study(tmp_path, None)
    shutil.rmtree(tmp_path/'.git')
    (tmp_path/'params.yaml').write_text('study: {}\n')
    with pytest.raises(StudyError, match="'dvc config core.no_scm true'"):
        repro([], s.dir)

# ---- the whole pipeline

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
    shutil.rmtree(repo/'results')
    assert chain(repo, ['dvc.lock', 'rwlock', 'dvc'], rng, left) >= 2
    assert left and same_files(repo) == want

if __name__ == '__main__':
    print(json.dumps(campaign(Path(sys.argv[1]), Path(sys.argv[2]))))

@pytest.mark.slow
def test_of_two_repros_in_one_study_one_does_the_work_and_the_other_waits_or_says_who_does(repo):
    before = same_files(repo)
    forget(repo, AGGREGATES)
    how = dict(cwd=repo, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    a, b = (subprocess.Popen(cmd, **how) for cmd in (['dvc', 'repro'], [*SYNTHSCALE, 'repro']))
    said = [p.communicate()[0] for p in (a, b)]
    assert 0 in (a.returncode, b.returncode), said
    for p, text in zip((a, b), said):
        assert p.returncode == 0 or re.search(r'lock|being blocked by|process \d+', text), text
    assert 'up to date' in sh('dvc repro', repo) and same_files(repo) == before
