"Cached sets of one study where another one wants them: one set in a clone, or from outside of any clone."
import hashlib
import pytest
from conftest import sh

pytestmark = pytest.mark.slow

def same_files(a, b):
    "Whether two folders have the same files with the same bytes."
    names = [{p.relative_to(d): p.read_bytes() for p in d.rglob('*') if p.is_file()} for d in (a, b)]
    return names[0] == names[1] and len(names[0]) > 1

def test_one_set_is_pulled_in_a_clone(finished, tmp_path):
    sh(['git', 'clone', '-q', str(finished), 'clone'], tmp_path)
    sh('dvc pull -q generate@names_g2', tmp_path/'clone')
    assert same_files(tmp_path/'clone'/'sets'/'names_g2', finished/'sets'/'names_g2')
    assert [p.name for p in (tmp_path/'clone'/'sets').iterdir() if p.is_dir()] == ['names_g2']

def test_one_set_is_got_from_outside(finished, tmp_path):
    "The default remote is a folder inside the repository, which DVC does not find from outside: its place is given."
    where = ['--remote-config', f'url={finished/"remote"}']
    sh(['dvc', 'get', str(finished), 'sets/names_g2', *where, '-o', 'got'], tmp_path)
    assert same_files(tmp_path/'got', finished/'sets'/'names_g2')

def test_one_set_is_imported_into_another_repository(finished, tmp_path):
    sh('git init -q && dvc init -q', tmp_path)
    where = ['--remote-config', f'url={finished/"remote"}']
    sh(['dvc', 'import', '-q', str(finished), 'sets/names_g2', *where], tmp_path)
    assert same_files(tmp_path/'names_g2', finished/'sets'/'names_g2') and (tmp_path/'names_g2.dvc').exists()

def test_another_default_remote(finished, tmp_path):
    "A clone is pointed to another place of the same objects."
    sh(['git', 'clone', '-q', str(finished), 'clone'], tmp_path)
    (tmp_path/'clone'/'remote').rename(tmp_path/'elsewhere')
    sh('dvc pull -q generate@names_g2', tmp_path/'clone', ok=False)
    sh(['dvc', 'remote', 'modify', '--local', 'embedded', 'url', str(tmp_path/'elsewhere')], tmp_path/'clone')
    sh('dvc pull -q generate@names_g2', tmp_path/'clone')
    assert same_files(tmp_path/'clone'/'sets'/'names_g2', finished/'sets'/'names_g2')

@pytest.mark.parametrize('out, file', [('sets/rendered', 'manifest.parquet'), ('runs/classify/digits/points.jsonl', ''),
                                       ('models/mini_sd', 'unet/diffusion_pytorch_model.safetensors')])
def test_a_damaged_object_of_the_remote_is_not_pulled(repo, out, file):
    "One byte of it: nobody looks at a manifest, a model or finished points again later."
    name = f'{out}/{file}'.rstrip('/')
    md5 = hashlib.md5((repo/name).read_bytes()).hexdigest()
    sh('git clone -q repo clone', repo.parent)
    clone = repo.parent/'clone'
    stored = clone/'remote'/'files'/'md5'/md5[:2]/md5[2:]
    good = stored.read_bytes()
    stored.write_bytes(good[:-9]+bytes([good[-9] ^ 1])+good[-8:])
    assert out in sh(f'dvc pull {out}', clone, ok=False)
    assert not (clone/name).exists()
    stored.write_bytes(good)
    sh(f'dvc pull {out}', clone)
    assert (clone/name).read_bytes() == (repo/name).read_bytes()
