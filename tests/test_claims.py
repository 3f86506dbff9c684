"What the study set out to compare was declared before it was trained, and the claims follow from the tables."
import subprocess
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from synthscale.analysis import declared_as_now
from synthscale.components import holm
from synthscale.primary import claims_table, outcome
from synthscale.study import Study

ROOT = Path(__file__).resolve().parent.parent
STUDIES = [p.parent for p in (ROOT/'params.yaml', *sorted(ROOT.glob('studies/*/params.yaml')))]
DECLARED = [p for p in STUDIES if Study(p).laws.declared]

def git(*args):
    return subprocess.run(['git', '-C', str(ROOT), *args], capture_output=True, text=True)

@pytest.mark.parametrize('section', ['laws', 'clip'])
@pytest.mark.parametrize('folder', DECLARED, ids=lambda p: p.name)
def test_the_commit_that_params_yaml_names_declares_what_is_compared_and_changes_no_table(folder, section):
    commit, primary = (getattr(getattr(Study(folder), section), k) for k in ('declared', 'primary'))
    if not commit:
        pytest.skip(f'this study declares nothing under {section}')
    if git('cat-file', '-e', commit).returncode:
        pytest.skip('git does not have the commit here (a shallow clone?)')
    assert declared_as_now(folder, commit, section) is True
    assert primary
    then = git('show', f'{commit}:results/curves.csv').stdout          # of the study before, or none
    assert not {c for p in primary for c in sum(p.curves, [])} & {line.split(',')[2] for line in then.splitlines()}
    changed = git('show', '--name-only', '--format=', commit).stdout.split()
    assert changed and not [p for p in changed if '/results/' in f'/{p}' or p.endswith('.csv')]

def test_a_declaration_that_was_changed_later_is_found(tmp_path):
    def write(name, text):
        (tmp_path/name).write_text(text)
        subprocess.run(['git', '-C', tmp_path, 'add', '-A'], check=True)
        who = ['-c', 'user.name=x', '-c', 'user.email=x@example.org']
        subprocess.run(['git', '-C', tmp_path, *who, 'commit', '-qm', 'x'], check=True)
        return subprocess.check_output(['git', '-C', tmp_path, 'rev-parse', 'HEAD'], text=True).strip()
    subprocess.run(['git', 'init', '-q', tmp_path], check=True)
    text = (DECLARED[0]/'params.yaml').read_text()
    first = write('params.yaml', text)
    assert declared_as_now(tmp_path, first) is True
    for section in ('laws', 'clip'):
        head, _, body = text.partition(f'\n{section}:')
        second = write('params.yaml', f"{head}\n{section}:{body.replace('expected: lower', 'expected: differ', 1)}")
        assert declared_as_now(tmp_path, first, section) is False
        assert declared_as_now(tmp_path, second, section) is True
    assert declared_as_now(tmp_path, '0'*40) is None

@pytest.mark.parametrize('verdict, above, expected, found', [
    ('not shown', True, 'higher', 'not shown'), ('differ', True, 'higher', 'holds'),
    ('differ', False, 'higher', 'does not hold'), ('helps', False, 'lower', 'holds'),
    ('hurts', True, 'lower', 'does not hold'), ('these models', True, 'differ', 'holds for these models'),
    ('these models', False, 'higher', 'does not hold')])
def test_outcomes(verdict, above, expected, found):
    assert outcome(verdict, above, expected) == found

FILES = dict(laws='primary.csv', clip='clip_primary.csv')
TABLES = [(p, section, file) for p in DECLARED for section, file in FILES.items()
          if getattr(Study(p), section).primary and (p/'results'/file).exists()]

@pytest.mark.parametrize('folder, section, file', TABLES, ids=lambda p: getattr(p, 'name', p))
def test_every_claim_has_its_row(folder, section, file):
    declared, table = getattr(Study(folder), section).primary, pd.read_csv(folder/'results'/file)
    claims = claims_table(declared, table)
    assert list(claims.claim) == [p.claim for p in declared if p.claim]
    assert len(declared) <= 8 and np.allclose(table.p_holm, holm(table.p))
    about = {p.claim: p for p in declared}
    for c in claims.itertuples():
        above = c.estimate > (about[c.claim].kind != 'exponent')
        as_expected = about[c.claim].expected in ('differ', 'higher' if above else 'lower')
        words = 'holds for these models' if about[c.claim].about_kinds else 'holds'
        assert c.outcome == ('not shown' if c.p_holm >= .05 else words if as_expected else 'does not hold')
