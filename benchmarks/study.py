"""The embedded study's wall time and memory: from nothing, with the remote, and with nothing to do. Prints one JSON line.

    python benchmarks/study.py            # clones the committed repository into a temporary folder; about as long as the study takes
    python benchmarks/study.py --quick    # leaves out the run from nothing
"""
import argparse, json, os, platform, re, subprocess, sys, tempfile, threading, time
from importlib.metadata import version
from pathlib import Path
import joblib, psutil

ROOT = Path(__file__).resolve().parent.parent

def tree_memory(pid):
    "Resident memory of a process and all below it, in MB (pages shared between them are counted in each)."
    total = 0
    for p in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try: total += p.memory_info().rss
        except psutil.NoSuchProcess: pass
    return total/2**20

def timed(cmd, cwd):
    "Wall seconds, peak memory in MB, what a command printed and seconds of each kind of stage; raises if it failed."
    env = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    start = time.time()
    p = subprocess.Popen(cmd, cwd=cwd, shell=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
    said, at, peak = [], [], 0
    def read():
        for line in p.stdout: said.append(line); at.append(time.time())
    reader = threading.Thread(target=read)
    reader.start()
    while p.poll() is None:
        try: peak = max(peak, tree_memory(p.pid))
        except psutil.NoSuchProcess: pass
        time.sleep(.5)
    reader.join()
    if p.returncode: raise SystemExit(f'{cmd} failed:\n{"".join(said)[-3000:]}')
    return time.time()-start, peak, ''.join(said), stage_seconds(said, [*at, time.time()])

def stage_seconds(lines, at):
    "Seconds of each kind of stage: from the line that announces one to the line that announces the next."
    marks = [(m.group(1), t) for l, t in zip(lines, at) if (m := re.search(r"Running stage '(\w+)", l))]
    out = {}
    for (name, t), (_, end) in zip(marks, [*marks[1:], (None, at[-1])]): out[name] = round(out.get(name, 0)+end-t, 1)
    return out

def main():
    a = argparse.ArgumentParser(); a.add_argument('--quick', action='store_true')
    quick = a.parse_args().quick
    out = dict(benchmark='study', study='digits', cores=joblib.cpu_count(), python=platform.python_version(), torch=version('torch'), timm=version('timm'), diffusers=version('diffusers'), dvc=version('dvc'))
    with tempfile.TemporaryDirectory() as d:
        timed(f'git clone -q {ROOT} {d}/pulled', d)
        out['remote_mb'] = sum(f.stat().st_size for f in Path(d, 'pulled', 'remote').rglob('*') if f.is_file())/1e6
        out['with_remote_s'], out['with_remote_peak_mb'], said, _ = timed('dvc repro --pull', f'{d}/pulled')
        out['with_remote_ran'] = said.count('Running stage')
        out['noop_s'], _, said, _ = timed('dvc repro', f'{d}/pulled')
        assert 'up to date' in said
        if not quick:
            timed(f'git clone -q {ROOT} {d}/nothing && cd {d}/nothing && dvc pull -q data.dvc && rm -rf results figures dvc.lock', d)
            out['from_nothing_s'], out['from_nothing_peak_mb'], said, out['stages_s'] = timed('dvc repro --no-run-cache', f'{d}/nothing')
            out['from_nothing_ran'] = said.count('Running stage')
            out['same_tables'] = all((Path(d)/'nothing'/'results'/p.name).read_bytes() == p.read_bytes() for p in (Path(d)/'pulled'/'results').glob('*.csv'))
    print(json.dumps({k: round(v, 1) if isinstance(v, float) else v for k, v in out.items()}))

if __name__ == '__main__': main()
