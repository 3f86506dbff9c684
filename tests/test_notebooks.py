"Every notebook is a lesson that asserts its own points: one test per notebook, as `nbdev_test` runs it."
import pytest
from conftest import ROOT, sh

pytestmark = pytest.mark.slow

@pytest.mark.parametrize('name', sorted(p.name for p in (ROOT/'nbs').glob('*.ipynb')))
def test_notebook(name):
    out = sh(['nbdev_test', '--path', f'nbs/{name}', '--n_workers', '0'], ROOT)
    assert 'Success' in out
