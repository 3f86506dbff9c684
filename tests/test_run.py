"The runner: strict parameters, equal bytes, one writer, and nobody who outlives it."
import os, shutil, signal, subprocess, sys, time
import nbformat, psutil, pytest, yaml
from nbformat.v4 import new_code_cell, new_notebook
from ruamel.yaml import YAML
from conftest import ROOT, WAIT, dump, environment, sh
from synthscale.params import params_json
from synthscale.run import main, new_study, one_writer, run_alone
from synthscale.smoke import smoke_params
from synthscale.stages import RUN_HEADING, code_only, normalise, notebook_bytes
from synthscale.study import Study, StudyError

def study(folder, *cells):
    "A study folder whose stage `demo` consists of the given cells, as prepare would leave it."
    dump(smoke_params(), folder/'params.yaml')
    first = new_code_cell("study_dir: str = ''  # where\nn: int = 3  # how many", metadata={'tags': ['parameters']})
    nb = normalise(new_notebook(cells=[first, *[new_code_cell(c, metadata={'tags': []}) for c in cells]]))
    nb.metadata['code'] = {}                               # nothing of the package is beside the study
    for place in ('nbs', 'build/nbs'):
        (folder/place).mkdir(parents=True)
        (folder/place/'99_demo.ipynb').write_bytes(notebook_bytes(nb))
    (folder/'build'/'params.json').write_text(params_json(Study(folder)))
    return folder

def wait_for(there, process):
    "Until something is there, or the process that is to make it has ended."
    while not there() and process.poll() is None:
        time.sleep(.05)
    assert there()

def run(folder, *args):
    return main([*args, '--study', str(folder)])

def test_a_parameter_arrives_and_the_folder_is_the_study(tmp_path):
    d = study(tmp_path, "import os\nopen('seen.txt', 'w').write(f'{n} {os.getcwd()}')")
    assert run(d, 'demo', '-p', 'n', '9') == 0
    assert (d/'seen.txt').read_text() == f'9 {d.resolve()}'
    assert (d/'runs'/'demo'/'9.ipynb').exists()

def test_two_runs_give_the_same_bytes_without_progress_bars(tmp_path):
    d = study(tmp_path, "import time, sys\nfrom tqdm import tqdm\n"
                        "for i in tqdm(range(3)): time.sleep(.01)\nprint('done')\nn")
    assert run(d, 'demo') == 0
    first = (d/'runs'/'demo'/'demo.ipynb').read_bytes()
    assert b'done' in first and b'it/s' not in first
    assert run(d, 'demo') == 0
    assert (d/'runs'/'demo'/'demo.ipynb').read_bytes() == first

@pytest.mark.parametrize('args, words', [
    (['demo', '-p', 'm', '1'], "99_demo.ipynb has no parameter 'm'"),
    (['demo', '-p', 'n', 'x'], "parameter 'n': 'x' is not a value of type int"),
    (['dmo'], "no stage 'dmo'")])
def test_wrong_calls_are_named(tmp_path, capsys, args, words):
    assert run(study(tmp_path, 'n'), *args) == 1
    assert words in capsys.readouterr().err

@pytest.mark.parametrize('args', [['demo', 'n'], ['demo', '-p', 'n'], ['demo', '-q', 'n', '1']])
def test_wrong_forms_of_a_call_show_the_right_one(tmp_path, capsys, args):
    with pytest.raises(SystemExit):
        run(study(tmp_path, 'n'), *args)
    assert '[-p NAME VALUE]' in capsys.readouterr().err and not (tmp_path/'runs').exists()

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
    d = study(tmp_path, "from synthscale.study import die_with_parent\ndie_with_parent()\n"
                        "open('up', 'w')\nimport time\ntime.sleep(7200)")
    env = environment() | {'PYTHONPATH': str(ROOT)}
    p = subprocess.Popen([sys.executable, '-m', 'synthscale.run', 'demo'], cwd=d, env=env)
    wait_for((d/'up').exists, p)
    [kernel] = kernels(p.pid)
    p.send_signal(sig)
    p.wait(WAIT)
    psutil.wait_procs([kernel], timeout=WAIT)               # its cell alone would go on for two hours
    assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE

def test_a_second_writer_waits(tmp_path):
    d = study(tmp_path, "import time\nopen('log', 'a').write('in ')\ntime.sleep(2)\nopen('log', 'a').write('out ')")
    env = environment() | {'PYTHONPATH': str(ROOT)}
    ps = [subprocess.Popen([sys.executable, '-m', 'synthscale.run', 'demo'], cwd=d, env=env,
                           stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = ''.join(p.communicate(timeout=WAIT)[1] for p in ps)
    assert [p.returncode for p in ps] == [0, 0]
    assert (d/'log').read_text() == 'in out in out ' and 'waiting for another run of demo-demo' in said

def test_two_runs_by_hand_one_of_which_gives_up_says_who_holds_it(tmp_path):
    with one_writer(tmp_path/'x.lock'):
        with pytest.raises(StudyError, match=f'another run: process {os.getpid()} .*stop it, or wait'):
            with one_writer(tmp_path/'x.lock', wait=.1):
                pass

def test_a_run_says_nothing_but_what_it_has_to_say(tmp_path):
    "Not that its kernel was interrupted when it was ended."
    d = study(tmp_path, 'n')
    said = [sh([sys.executable, '-m', 'synthscale.run', 'demo', '--study', str(d)], ROOT) for _ in range(3)]
    assert said == ['', '', '']

def test_every_stage_notebook_strips_to_code_that_compiles():
    for p in sorted((ROOT/'nbs').glob('*.ipynb')):
        nb = code_only(nbformat.read(p, 4), 'study')
        if nb is None: continue
        assert RUN_HEADING not in str(nb) and all(c.cell_type == 'code' for c in nb.cells)
        for c in nb.cells:
            compile(c.source, p.name, 'exec')

# ---- a study of one's own

@pytest.fixture
def clone(tmp_path):
    "What new-study reads of a clone, in a git repository."
    root = tmp_path/'clone'
    (root/'studies').mkdir(parents=True)
    for name in ('dvc.yaml', 'params.yaml', '.dvcignore'):
        (root/name).write_bytes((ROOT/name).read_bytes())
    shutil.copytree(ROOT/'.dvc'/'plots', root/'.dvc'/'plots')
    sh('git init -q', root)
    return root

def everything(folder):
    "All files and folders below one, with their contents."
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob('*')}

def in_use(root):
    "A folder that somebody works in."
    (root/'studies'/'mine').mkdir()
    (root/'studies'/'mine'/'notes.txt').write_text('mine')
    return root/'studies'/'mine'

def a_file(root):
    "A file where the folder would be."
    (root/'studies'/'mine').write_text('mine')
    return root/'studies'/'mine'

@pytest.mark.parametrize('place, words', [
    (in_use, 'not empty'), (a_file, 'not empty'),
    (lambda root: root/'studies'/'my study', "'my study': expected letters, digits"),
    (lambda root: root/'studies'/'a.b', "'a.b': expected letters, digits"),
    (lambda root: root/'studies'/'größe', 'expected letters, digits'),
    (lambda root: root.parent/'mine', 'a study is inside the repository'),
    (lambda root: root, 'not empty')])
def test_a_study_that_cannot_be_laid_out_is_refused(clone, place, words):
    folder, before = place(clone), everything(clone.parent)
    with pytest.raises(StudyError, match=words):
        new_study(folder, clone)
    assert everything(clone.parent) == before

@pytest.mark.parametrize('name', ['2026', '1e3', 'on', 'null', '0x10', '0o17', '2026-11-26', 'true', 'No', '_1',
                                  '1_000', '+1', '-1', 'mine'])
def test_a_name_that_yaml_takes_for_something_else_stays_a_name(clone, name):
    d = new_study(clone/'studies'/name, clone)
    assert Study(d).study.name == name and Study(d).root == clone
    for loader in (yaml.safe_load, YAML(typ='safe').load):              # YAML 1.1, and 1.2 as DVC reads it
        assert loader((d/'params.yaml').read_text())['study']['name'] == name

@pytest.mark.parametrize('name', ['~', '{}', '.inf', "it's", '1:30'])
def test_other_names_are_refused_before_anything_is_written(clone, name):
    before = everything(clone)
    with pytest.raises(StudyError, match='expected letters, digits'):
        new_study(clone/'studies'/name, clone)
    assert everything(clone) == before

def test_a_study_outside_of_git_is_refused(clone):
    sh('rm -rf .git', clone)
    before = everything(clone)
    with pytest.raises(StudyError, match="not a git repository.*'git init'"):
        new_study(clone/'studies'/'mine', clone)
    assert everything(clone) == before

def test_the_command_refuses_as_the_function_does(tmp_path):
    out = sh(['synthscale', 'new-study', str(tmp_path/'mine')], tmp_path, ok=False)
    assert out.startswith('synthscale: ') and 'inside the repository' in out and not list(tmp_path.iterdir())

# ---- results of one's own

def test_own_results_need_a_place_and_a_file(tmp_path):
    with pytest.raises(StudyError, match='-p out FOLDER'):
        run_alone('laws', {'curves': 'x.csv'})
    with pytest.raises(StudyError, match='no such file'):
        run_alone('laws', {'curves': str(tmp_path/'x.csv'), 'out': str(tmp_path/'o')})

@pytest.mark.parametrize('stage, made', [('laws', 'laws.csv'), ('report', 'scaling_test.png')])
def test_laws_and_report_of_your_own_curves(tmp_path, stage, made):
    import pandas as pd
    rows = [dict(curve=c, n_images=n, seed=s, value=(2+s/100)*n**-k)
            for c, k in (('photos', .5), ('generated', .2)) for n in (10, 20, 40, 80) for s in range(3)]
    pd.DataFrame(rows).to_csv(tmp_path/'my.csv', index=False)
    sh(['synthscale', stage, '-p', 'curves', 'my.csv', '-p', 'out', 'mine'], tmp_path)
    assert (tmp_path/'mine'/made).exists() and (tmp_path/'mine'/f'{stage}.ipynb').exists()
    if stage == 'laws':
        assert pd.read_csv(tmp_path/'mine'/'laws.csv').k.round(6).tolist() == [.5, .2]
