"The wheel, installed outside of any clone: tables of one's own, and a study of one's own photographs."
import subprocess, sys
import numpy as np, pandas as pd, pytest
from conftest import ROOT, copy_repo, edit, environment, ran
from test_new import photos, shorter

pytestmark = pytest.mark.slow

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A folder of packages with the wheel alone; what it needs comes from the environment of the tests."
    d = tmp_path_factory.mktemp('wheel')
    copy_repo(d/'clone', skip=('remote/', 'studies/', 'results/', 'figures/', 'dvc.lock', 'tests/'))
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
    subprocess.run([*pip, 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', d/'dist', d/'clone'], check=True)
    wheel, = (d/'dist').glob('synthscale-*.whl')
    subprocess.run([*pip, 'install', '-q', '--no-deps', '--target', d/'site', wheel], check=True)
    return d/'site'

def run(command, cwd, site):
    "A command of the installed wheel; returns what it says."
    env = environment() | dict(PYTHONPATH=str(site))
    r = subprocess.run([sys.executable, '-m', *command], cwd=cwd, env=env, capture_output=True, text=True)
    assert r.returncode == 0, (r.stdout+r.stderr)[-4000:]
    return r.stdout+r.stderr

def test_the_wheel_holds_notebooks_and_pipeline(site, tmp_path):
    where = run(['synthscale.run', '--help'], tmp_path, site)
    assert 'new' in where
    code = 'import synthscale, synthscale.study as s; print(synthscale.__file__, s.package_root())'
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment() | dict(PYTHONPATH=str(site)),
                         capture_output=True, text=True, check=True).stdout.split()
    assert out == [str(site/'synthscale'/'__init__.py'), str(site/'synthscale'/'_study')]
    brought = {p.name for p in (site/'synthscale'/'_study'/'nbs').iterdir()}
    assert brought == {p.name for p in (ROOT/'nbs').glob('[0-9]*.ipynb')}

def test_own_tables_are_fitted_and_reported_without_a_clone(site, tmp_path):
    n = np.array([100, 200, 400, 800, 1600])
    rows = [dict(curve=c, n_images=k, seed=s, value=a*k**-.3*(1+.01*s)) for c, a in (('real', 5.), ('made', 6.))
            for k in n for s in range(3)]
    pd.DataFrame(rows).to_csv(tmp_path/'my.csv', index=False)
    run(['synthscale.run', 'laws', '-p', 'curves', 'my.csv', '-p', 'out', 'mine'], tmp_path, site)
    laws = pd.read_csv(tmp_path/'mine'/'laws.csv')
    assert np.allclose(laws.k, .3, atol=.01) and set(laws.curve) == {'real', 'made'}
    run(['synthscale.run', 'report', '-p', 'curves', 'my.csv', '-p', 'out', 'shown'], tmp_path, site)
    assert list((tmp_path/'shown').glob('*.png'))

def test_a_study_of_the_wheel_runs_and_notices_another_package(site, tmp_path):
    "No place of the package is in its lock; other code says what it makes stale, a comment makes nothing stale."
    photos(tmp_path/'pets', cat=16, dog=16)
    run(['synthscale.run', 'new', 'mine', '--images', 'pets', '--image-size', '8', '--budget', '240m', '--seeds', '2'],
        tmp_path, site)
    edit(tmp_path/'mine', shorter)
    d, dvc = tmp_path/'mine', ['dvc', 'repro']
    assert 'classify@photos' in ran(run(dvc, d, site))
    lock = (d/'dvc.lock').read_text()
    assert str(site) not in lock and 'site-packages' not in lock and str(ROOT) not in lock
    assert ran(run(dvc, d, site)) == {'prepare'}
    module = site/'synthscale'/'exchange.py'
    text = module.read_text()
    module.write_text(text+'\n# a comment\n')
    assert ran(run(dvc, d, site)) == {'prepare'}
    module.write_text(text+'\nANOTHER = 1\n')
    out = run(dvc, d, site)
    assert 'other code than in the last run, so these stages will run again: ' in out and 'laws (exchange)' in out
    assert {'laws', 'report'} <= ran(out) and 'classify@photos' not in ran(out)
    module.write_text(text)
