"""Kills of `dvc repro` and of everything below it, at any moment and in the middle of DVC's own writes: the next
`synthscale repro` goes on by itself, and what comes out is as if nobody had been killed."""
import json, os, random, signal, subprocess, sys, time
import pytest
from conftest import environment, load, ran, sh
from synthscale.doctor import doctor, good_copy, lock_problem

pytestmark = pytest.mark.slow
EVERYTHING = 'build runs sets models evaluators results figures dvc.lock'

def start(d, *options):
    "`dvc repro` in a process group of its own."
    return subprocess.Popen([sys.executable, '-m', 'dvc', 'repro', *options], cwd=d, env=environment(),
                            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

def size(path):
    "Bytes of a file; None where there is none."
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None

def until_written(p, path, skip):
    """Wait until a file is being rewritten for the `skip`-th time: in place, it is shorter than it was for a moment.
    DVC writes so fast that this only rarely meets the middle; the end is then as good a moment."""
    last, seen = size(path), 0
    while p.poll() is None:
        now = size(path)
        seen += now is not None and now < (last or 0)
        if seen > skip: return
        last = now

def until(p, seconds):
    "Wait so many seconds, or until the run has ended."
    end = time.monotonic()+seconds
    while p.poll() is None and time.monotonic() < end:
        time.sleep(.01)

def kill_group(p):
    "SIGKILL for a run and all that is in its group; whether it was still running."
    if p.poll() is not None: return False
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    return True

def state(d):
    "What a kill has left: of dvc.lock what `lock_problem` says, of rwlock whether it can be read."
    text = (d/'dvc.lock').read_text() if (d/'dvc.lock').exists() else None
    good = good_copy(d).read_text() if good_copy(d).exists() else ''
    try:
        rw = bool(json.loads((d/'.dvc'/'tmp'/'rwlock').read_text()) or True)
    except FileNotFoundError:
        rw = True
    except ValueError:
        rw = False
    return lock_problem(text, good) if text is not None else '', rw

def tables(d):
    "The tables of a study but those of costs."
    return {p.name: p.read_bytes() for p in sorted((d/'results').glob('*.csv')) if p.name != 'costs.csv'}

def sets(d):
    "The files of all image sets."
    return {p.relative_to(d).as_posix(): p.read_bytes() for p in sorted((d/'sets').rglob('*')) if p.is_file()}

def chain(d, moments, *options, lost=EVERYTHING):
    "One run without these outs that is killed at each moment and begun again; counts of what the kills left."
    sh(f'rm -rf {lost}', d)
    count = dict(kills=0, aimed=0, lock_cut=0, rwlock_cut=0, lines=0)
    for moment in moments:
        p = start(d, *options)
        moment(p)
        if not kill_group(p): continue
        lock, rw = state(d)
        lines = doctor(d)
        assert not lock or lines, lock
        assert state(d) == ('', True)
        aimed = moment.__name__ == 'aimed'
        for k, n in dict(kills=1, aimed=aimed, lock_cut=bool(lock), rwlock_cut=not rw, lines=len(lines)).items():
            count[k] += int(n)
    return count

def aim(path, skip):
    "A moment in the middle of DVC's write of a file."
    def aimed(p):
        until_written(p, path, skip)
    return aimed

def later(seconds):
    "A moment so many seconds after the start."
    def at_random(p):
        until(p, seconds)
    return at_random

def finish(d, want, *options):
    "Go on to the end with `synthscale repro`, without a hand, and compare."
    sh(['synthscale', 'repro', *options], d)
    assert 'up to date' in sh('dvc repro', d)
    assert (tables(d), sets(d)) == want

def test_a_run_is_killed_in_the_middle_of_writes_and_finishes_by_itself(repo):
    "The last stages, once restored from the run cache and once run."
    want = tables(repo), sets(repo)
    lock, rw = repo/'dvc.lock', repo/'.dvc'/'tmp'/'rwlock'
    for moments, options in (([aim(lock, 0), aim(lock, 1)], []), ([aim(lock, 0), aim(rw, 2)], ['--no-run-cache'])):
        count = chain(repo, moments, *options, lost='results figures runs/laws runs/report runs/quality')
        assert count['kills'] > 0
        finish(repo, want, *options)

@pytest.mark.campaign
def test_thirty_kills_at_random_and_in_the_middle_of_writes(repo):
    """With the run cache, whose restores write dvc.lock in a row, and without it; the counts go to the file that the
    environment variable CAMPAIGN names, as one line of JSON."""
    want, rng = (tables(repo), sets(repo)), random.Random(0)
    lock, rw = repo/'dvc.lock', repo/'.dvc'/'tmp'/'rwlock'
    total, chains, began = {}, 0, time.time()
    while total.get('kills', 0) < 30 or total['aimed'] < 12:
        options = ['--no-run-cache'] if chains % 2 else []
        longest = 40 if chains % 2 else 5
        moments = [later(rng.uniform(1, longest)) for _ in range(4)]
        moments += [aim(lock, rng.randrange(4)), aim(rw, rng.randrange(20)), aim(lock, rng.randrange(2))]
        rng.shuffle(moments)
        for k, n in chain(repo, moments, *options).items():
            total[k] = total.get(k, 0)+n
        finish(repo, want, *options)
        chains += 1
    line = json.dumps(dict(benchmark='kills', **total, chains=chains, finished=chains, same_bytes=chains,
                           minutes=round((time.time()-began)/60, 1)))
    print(line)
    if os.environ.get('CAMPAIGN'):
        with open(os.environ['CAMPAIGN'], 'a') as f:
            f.write(line+'\n')

# ---- every cut of dvc.lock and of rwlock

def cuts(text, n):
    "A text cut at n places, from nothing to all but the last character."
    return [text[:round(i*(len(text)-1)/(n-1))] for i in range(n)]

def test_every_cut_of_the_lock_ends_in_a_whole_one(repo):
    "With the copy and git, with git alone, and with neither."
    path, whole = repo/'dvc.lock', (repo/'dvc.lock').read_text()
    for text in cuts(whole, 40):
        path.write_text(text)
        doctor(repo)
        assert path.read_text() == whole
    good_copy(repo).unlink(missing_ok=True)
    path.write_text(whole[:-30])
    assert len(doctor(repo)) == 1 and path.read_text() == whole             # as git has it
    sh('git rm -q --cached dvc.lock && git commit -qm without', repo)
    path.write_text('')
    assert len(doctor(repo)) == 1 and not path.exists()
    path.write_text(whole)
    assert ran(sh('dvc repro', repo)) == set()

def test_a_stage_that_meets_a_cut_lock_stops(repo):
    path, whole = repo/'dvc.lock', (repo/'dvc.lock').read_text()
    sh(['synthscale', 'results'], repo)                      # keeps a copy
    before = {p: p.stat().st_mtime_ns for p in (repo/'results').iterdir()}
    for text in ('', whole[:len(whole)//2], whole[:whole.index('\n  results:')+1]):
        path.write_text(text)
        out = sh(['synthscale', 'results'], repo, ok=False)
        assert 'dvc.lock' in out and "'synthscale doctor'" in out and 'Traceback' not in out
    assert {p: p.stat().st_mtime_ns for p in (repo/'results').iterdir()} == before
    assert 'the last whole one is back' in sh(['synthscale', 'doctor'], repo)
    assert path.read_text() == whole and 'are whole' in sh(['synthscale', 'doctor'], repo)

def test_an_older_commit_is_no_damage(repo):
    "The lock of an older commit may be the first part of that of a later one."
    whole = load(repo/'dvc.lock')
    text = (repo/'dvc.lock').read_text()
    old = text[:text.index('\n  '+list(whole['stages'])[-1]+':')+1]
    (repo/'dvc.lock').write_text(old)
    sh('git commit -qam older', repo)
    sh(['synthscale', 'results'], repo)
    assert doctor(repo) == [] and (repo/'dvc.lock').read_text() == old

@pytest.mark.parametrize('text', ['', '{', '{"read": {"sets/digits": [{"pid": 1', '[]', 'null', '\0\0\0'])
def test_a_list_of_files_in_use_that_cannot_be_read_is_removed(repo, text):
    path = repo/'.dvc'/'tmp'/'rwlock'
    path.write_text(text)
    assert 'rwlock' in sh(['synthscale', 'doctor'], repo) and not path.exists()
    path.write_text(text)
    assert 'up to date' in sh(['synthscale', 'repro'], repo)
