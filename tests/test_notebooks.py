"Every notebook is a lesson that asserts its own points: one test per notebook, as `nbdev-test` runs it."
import pytest
from conftest import ROOT, sh

pytestmark = pytest.mark.slow

@pytest.mark.parametrize('name', sorted(p.name for p in (ROOT/'nbs').glob('*.ipynb')))
def test_notebook(name, request):
    if name == '04b_workers.ipynb':
        request.getfixturevalue('ray_turn')
    out = sh(['nbdev-test', f'nbs/{name}', '--n-workers', '0'], ROOT)
    assert 'Success' in out
