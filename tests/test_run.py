"The runner: strict parameters, equal bytes, one writer, and nobody who outlives it."
import os, signal, subprocess, sys, time
import nbformat, psutil, pytest
from nbformat.v4 import new_code_cell, new_notebook
from conftest import ROOT, dump, environment, sh
from synthscale.run import RUN_HEADING, check_parameters, code_only, execute, main, new_study, normalise, notebook_bytes, run_alone
from synthscale.smoke import smoke_params
from synthscale.study import Study, StudyError

def study(folder, *cells):
    "A study folder whose stage `demo` consists of the given cells."
    dump(smoke_params(), folder/'params.yaml')
    nb = new_notebook(cells=[new_code_cell("study_dir: str = ''  # where\nn: int = 3  # how many", metadata={'tags': ['parameters']}), *[new_code_cell(c, metadata={'tags': []}) for c in cells]])
    (folder/'build'/'nbs').mkdir(parents=True)
    (folder/'build'/'nbs'/'99_demo.ipynb').write_bytes(notebook_bytes(normalise(nb)))
    return folder

def run(folder, *args): return main([*args, '--study', str(folder)])

def test_a_parameter_arrives_and_the_folder_is_the_study(tmp_path):
    d = study(tmp_path, "import os\nopen('seen.txt', 'w').write(f'{n} {os.getcwd()}')")
    assert run(d, 'demo', '-p', 'n', '9') == 0
    assert (d/'seen.txt').read_text() == f'9 {d.resolve()}'
    assert (d/'runs'/'demo'/'9.ipynb').exists()

def test_two_runs_give_the_same_bytes_without_progress_bars(tmp_path):
    d = study(tmp_path, "import time, sys\nfrom tqdm import tqdm\nfor i in tqdm(range(3)): time.sleep(.01)\nprint('done')\nn")
    assert run(d, 'demo') == 0
    first = (d/'runs'/'demo'/'demo.ipynb').read_bytes()
    assert b'done' in first and b'it/s' not in first
    assert run(d, 'demo') == 0
    assert (d/'runs'/'demo'/'demo.ipynb').read_bytes() == first

@pytest.mark.parametrize('args, words', [
    (['demo', '-p', 'm', '1'], "99_demo.ipynb has no parameter 'm'"), (['demo', '-p', 'n', 'x'], "parameter 'n': 'x' is not a value of type int"),
    (['dmo'], "no stage 'dmo'"), (['demo', 'n'], "takes parameters as '-p NAME VALUE'")])
def test_wrong_calls_are_named(tmp_path, capsys, args, words):
    assert run(study(tmp_path, 'n'), *args) == 1
    assert words in capsys.readouterr().err

def test_a_lost_tag_is_an_error(tmp_path, capsys):
    d = study(tmp_path, 'n')
    nb = nbformat.read(d/'build'/'nbs'/'99_demo.ipynb', 4)
    nb.cells[0].metadata = {}
    (d/'build'/'nbs'/'99_demo.ipynb').write_bytes(notebook_bytes(nb))
    assert run(d, 'demo', '-p', 'n', '2') == 1
    assert "0 cells are tagged 'parameters'" in capsys.readouterr().err

def test_a_failed_run_keeps_the_notebook_and_leaves_no_out(tmp_path, capsys):
    d = study(tmp_path, "print('so far')", "raise ValueError('the reason')")
    assert run(d, 'demo') == 1
    err = capsys.readouterr().err
    assert 'ValueError: the reason' in err and 'build/failed/demo-demo.ipynb' in err
    assert 'so far' in (d/'build'/'failed'/'demo-demo.ipynb').read_text() and not (d/'runs').exists()

def kernels(pid):
    return [p for p in psutil.Process(pid).children(recursive=True) if 'ipykernel' in ' '.join(p.cmdline())]

@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGTERM])
def test_the_kernel_dies_with_the_runner(tmp_path, sig):
    d = study(tmp_path, "from synthscale.study import die_with_parent\ndie_with_parent()\nopen('up', 'w')\nimport time\ntime.sleep(120)")
    p = subprocess.Popen([sys.executable, '-m', 'synthscale.run', 'demo'], cwd=d, env=environment() | {'PYTHONPATH': str(ROOT)})
    deadline = time.time()+60
    while not (d/'up').exists() and time.time() < deadline: time.sleep(.1)
    [kernel] = kernels(p.pid)
    p.send_signal(sig)
    p.wait(20)
    psutil.wait_procs([kernel], timeout=20)
    assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE

def test_a_second_writer_waits(tmp_path):
    d = study(tmp_path, "import time\nopen('log', 'a').write('in ')\ntime.sleep(2)\nopen('log', 'a').write('out ')")
    ps = [subprocess.Popen([sys.executable, '-m', 'synthscale.run', 'demo'], cwd=d, env=environment() | {'PYTHONPATH': str(ROOT)}, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = ''.join(p.communicate(timeout=120)[1] for p in ps)
    assert [p.returncode for p in ps] == [0, 0]
    assert (d/'log').read_text() == 'in out in out ' and 'waiting for another run of demo-demo' in said

def test_dvc_killed_over_its_lock_file(tmp_path):
    "A parent that behaves as dvc does: runs the stage, begins to rewrite dvc.lock, and is killed in the middle."
    d = study(tmp_path, 'n')
    old = "schema: '2.0'\nstages:\n  a:\n    cmd: x\n    outs:\n    - path: o\n      md5: "+'a'*32+"\n      size: 1\n"
    (d/'dvc.lock').write_text(old)
    code = "import subprocess, sys, time\nsubprocess.run([sys.executable, '-m', 'synthscale.run', 'demo'], check=True)\nf = open('dvc.lock', 'w')\nf.write('schema: \\'2.0\\'\\nstag')\nf.flush()\nopen('half', 'w')\ntime.sleep(60)"
    p = subprocess.Popen([sys.executable, '-c', code], cwd=d, env=environment() | {'PYTHONPATH': str(ROOT), 'DVC_STAGE': 'demo'})
    deadline = time.time()+60
    while not (d/'half').exists() and time.time() < deadline: time.sleep(.05)
    assert 'stag' in (d/'dvc.lock').read_text()[-5:]
    p.kill(); p.wait()
    deadline = time.time()+10
    while (d/'dvc.lock').read_text() != old and time.time() < deadline: time.sleep(.05)
    assert (d/'dvc.lock').read_text() == old

def test_every_stage_notebook_strips_to_code_that_compiles():
    for p in sorted((ROOT/'nbs').glob('*.ipynb')):
        nb = code_only(nbformat.read(p, 4), 'study')
        if nb is None: continue
        assert RUN_HEADING not in str(nb) and all(c.cell_type == 'code' for c in nb.cells)
        for c in nb.cells: compile(c.source, p.name, 'exec')

def test_own_results_need_a_place_and_a_file(tmp_path):
    with pytest.raises(StudyError, match='-p out FOLDER'): run_alone('laws', {'curves': 'x.csv'})
    with pytest.raises(StudyError, match='no such file'): run_alone('laws', {'curves': str(tmp_path/'x.csv'), 'out': str(tmp_path/'o')})

@pytest.mark.parametrize('stage, made', [('laws', 'laws.csv'), ('report', 'scaling_test.png')])
def test_laws_and_report_of_your_own_curves(tmp_path, stage, made):
    import pandas as pd
    pd.DataFrame([dict(curve=c, n_images=n, seed=s, value=(2+s/100)*n**-k) for c, k in (('photos', .5), ('generated', .2)) for n in (10, 20, 40, 80) for s in range(3)]).to_csv(tmp_path/'my.csv', index=False)
    sh(['synthscale', stage, '-p', 'curves', 'my.csv', '-p', 'out', 'mine'], tmp_path)
    assert (tmp_path/'mine'/made).exists() and (tmp_path/'mine'/f'{stage}.ipynb').exists()
    if stage == 'laws': assert pd.read_csv(tmp_path/'mine'/'laws.csv').k.round(6).tolist() == [.5, .2]
