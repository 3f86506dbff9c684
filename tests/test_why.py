"`synthscale why STAGE`: which module, parameter or input makes a stage stale."
import os
import pandas as pd, pytest
from conftest import edit, sh

pytestmark = pytest.mark.slow
NOTHING = 'nothing has changed'

def why(repo, *args, ok=True):
    "What the command says."
    return sh(['synthscale', 'why', *args], repo, ok=ok)

def rows(text, what):
    "The rows of one kind."
    return [l.split() for l in text.splitlines() if l.split()[:1] == [what]]

def code_edit(repo, module):
    "A constant more at the end of a module."
    path = repo/'synthscale'/f'{module}.py'
    path.write_text(path.read_text()+'\nADDED = 1\n')

def test_code_names_the_module(repo):
    assert NOTHING in why(repo, 'laws') and NOTHING in why(repo, 'classify@digits')
    code_edit(repo, 'functional_forms')
    assert rows(why(repo, 'laws'), 'module') == [['module', 'functional_forms']]
    assert NOTHING in why(repo, 'classify@digits')
    code_edit(repo, 'study')
    assert rows(why(repo, 'laws'), 'module') == [['module', 'functional_forms'], ['module', 'study']]
    assert rows(why(repo, 'classify@digits'), 'module') == [['module', 'study']]

def test_parameters_are_named_with_both_values(repo):
    def change(p):
        p['recipes']['convnext_digits']['label_smoothing'] = .1
        p['report']['factors_n_images'] = 40
    edit(repo, change)
    [row] = rows(why(repo, 'classify@digits'), 'parameter')
    assert row[1].endswith('recipe.label_smoothing') and row[2:] == ['0.05', '0.1']
    assert ['parameter', 'report.factors_n_images', '80', '40'] in rows(why(repo, 'report'), 'parameter')
    assert NOTHING in why(repo, 'data@digits')

def test_inputs_are_named(repo):
    path = repo/'sets'/'digits'/'manifest.parquet'
    m = pd.read_parquet(path)
    os.chmod(path, 0o644)
    path.unlink()
    m.iloc[:-1].to_parquet(path)
    assert rows(why(repo, 'classify@digits'), 'input') == [['input', 'sets/digits', 'modified']]
    assert NOTHING in why(repo, 'laws')

def test_a_commit_is_compared_with(repo):
    code_edit(repo, 'functional_forms')
    edit(repo, lambda p: p['laws'].update(compare=[]))
    sh('git commit -qam edit', repo)
    found = why(repo, 'laws', '--rev', 'HEAD~1')
    assert rows(found, 'module') == [['module', 'functional_forms']]
    assert [r[1] for r in rows(found, 'parameter')] == ['laws.compare']
    assert NOTHING in why(repo, 'results', '--rev', 'HEAD~1')
    assert 'nosuch' in why(repo, 'laws', '--rev', 'nosuch', ok=False)
    assert 'dvc.lock' in why(repo, 'laws', '--rev', 'HEAD~2', ok=False)      # a commit before anything had run

def test_stages_that_are_not_there_or_never_ran(repo):
    assert "did you mean 'classify@digits'" in why(repo, 'clasify@digits', ok=False)
    edit(repo, lambda p: p['classify']['curves'].update(more=dict(set='digits', n_images=[20, 40])))
    out = why(repo, 'classify@more', ok=False)
    assert 'it has not run' in out and 'Traceback' not in out
