"""What the embedded study costs in a fresh clone: with the remote, with nothing to do, and from nothing. One JSON line.

    python benchmarks/study.py                          # takes about as long as the study
    python benchmarks/study.py --quick                  # leaves out the run from nothing
    python benchmarks/study.py --quick --before REV     # and compares with an older commit
"""
import argparse, json, os, platform, re, resource, shutil, subprocess, sys, tempfile, threading, time
from importlib.metadata import version
from pathlib import Path
import joblib, psutil

ROOT = Path(__file__).resolve().parent.parent

def tree_memory(pid):
    "Resident memory of a process and all below it, in MB (pages shared between them are counted in each)."
    total = 0
    for p in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            total += p.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return total/2**20

def timed(cmd, cwd):
    "Wall seconds, peak memory in MB, what a command printed and seconds of each kind of stage; raises if it failed."
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    start = time.time()
    p = subprocess.Popen(cmd, cwd=cwd, shell=True, env={**os.environ, 'PYTHONUNBUFFERED': '1', 'PATH': path},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
    said, at, peak = [], [], 0
    def read():
        for line in p.stdout:
            said.append(line)
            at.append(time.time())
    reader = threading.Thread(target=read)
    reader.start()
    while p.poll() is None:
        try:
            peak = max(peak, tree_memory(p.pid))
        except psutil.NoSuchProcess:
            pass
        time.sleep(.5)
    reader.join()
    if p.returncode: raise SystemExit(f'{cmd} failed:\n{"".join(said)[-3000:]}')
    return time.time()-start, peak, ''.join(said), stage_seconds(said, [*at, time.time()])

def stage_seconds(lines, at):
    "Seconds of each kind of stage: from the line that announces one to the line that announces the next."
    marks = [(m.group(1), t) for l, t in zip(lines, at) if (m := re.search(r"Running stage '(\w+)", l))]
    out = {}
    for (name, t), (_, end) in zip(marks, [*marks[1:], (None, at[-1])]):
        out[name] = round(out.get(name, 0)+end-t, 1)
    return out

def cpu(cmd, cwd):
    "CPU seconds of a command and its children, how many stages it ran, and its last line."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _, _, said, _ = timed(cmd, cwd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime+after.ru_stime-before.ru_utime-before.ru_stime
    return round(used, 1), said.count('Running stage'), said.strip().splitlines()[-1]

def clone(rev, to):
    "A clone of a commit of this repository."
    timed(f'git clone -q {ROOT} {to} && cd {to} && git checkout -q {rev}', to.parent)
    return to

def with_remote(d):
    "CPU seconds of the README's first command, after the installation, and of a run with nothing to do."
    new = clone('HEAD', d/'now')
    pull, _, _ = cpu('dvc pull --allow-missing', new)
    repro, ran, said = cpu('dvc repro', new)
    assert 'up to date' in said or ran, said
    noop, again, _ = cpu('dvc repro', new)
    remote = sum(f.stat().st_size for f in (new/'remote').rglob('*') if f.is_file())/1e6
    stages = len((new/'dvc.lock').read_text().split('\n    cmd:'))-1
    return dict(stages=stages, pull_cpu_s=pull, repro_cpu_s=repro, repro_ran=ran, noop_cpu_s=noop, noop_ran=again,
                remote_mb=round(remote, 1)) | growth(new)

def growth(clone, copies=10, like='guidance_2'):
    "CPU seconds of a run with nothing to do, with ten sources more: copies of one, which DVC is told were made."
    import ruamel.yaml
    yaml = ruamel.yaml.YAML()
    params = yaml.load(clone/'params.yaml')
    places = [p for top in ('sets', 'runs') for p in (clone/top).rglob(f'*{like}*') if like not in str(p.parent)]
    for name in [f'copy{i}' for i in range(copies)]:
        params['generate']['sources'][name] = params['generate']['sources'][like]
        for p in places:
            (shutil.copytree if p.is_dir() else shutil.copy)(p, p.with_name(p.name.replace(like, name)))
    with open(clone/'params.yaml', 'w') as f:
        yaml.dump(params, f)
    timed('dvc repro -q prepare && dvc commit -q -f', clone)
    stages = len((clone/'dvc.lock').read_text().split('\n    cmd:'))-1
    noop, ran, said = cpu('dvc repro', clone)
    assert ran == 0 and 'up to date' in said, said
    return dict(more_stages=stages, more_noop_cpu_s=noop)

def before(d, rev):
    "The same of an older commit, whose first command was dvc repro --pull."
    old = clone(rev, d/'before')
    first, _, _ = cpu('dvc repro --pull', old)
    noop, _, _ = cpu('dvc repro', old)
    return dict(before=rev, before_first_cpu_s=first, before_noop_cpu_s=noop)

def main():
    a = argparse.ArgumentParser()
    a.add_argument('--quick', action='store_true', help='leave out the run from nothing')
    a.add_argument('--before', default='', help='a commit to compare with')
    given = a.parse_args()
    packages = ('torch', 'timm', 'diffusers', 'dvc', 'ruamel.yaml.clib')
    versions = {p: version(p) for p in packages}
    machine = dict(cores=joblib.cpu_count(), python=platform.python_version())
    out = dict(benchmark='study', study='digits', **machine, **versions)
    with tempfile.TemporaryDirectory() as d:
        out |= with_remote(Path(d))
        if given.before:
            out |= before(Path(d), given.before)
        if not given.quick:
            out |= from_nothing(d, Path(d)/'now', Path(d)/'nothing')
    print(json.dumps({k: round(v, 1) if isinstance(v, float) else v for k, v in out.items()}))

def from_nothing(d, pulled, nothing):
    "The whole study, and whether its tables, but those of costs, are the committed ones."
    clone('HEAD', nothing)
    timed('dvc pull -q data.dvc && rm -rf results figures dvc.lock', nothing)
    seconds, peak, said, stages = timed('dvc repro --no-run-cache', nothing)
    tables = [p for p in (pulled/'results').glob('*.csv') if p.name != 'costs.csv']
    same = all((nothing/'results'/p.name).read_bytes() == p.read_bytes() for p in tables)
    return dict(from_nothing_s=seconds, from_nothing_peak_mb=peak, stages_s=stages,
                from_nothing_ran=said.count('Running stage'), same_tables=same)

if __name__ == '__main__':
    main()
