"Package metadata, read from settings.ini."
import shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent

class WithStudy(build_py):
    """Modules, and beside them in synthscale/_study what a study is run by: the notebooks of the stages, the pipeline,
    the parameters of the embedded study (the smoke study is made of them) and the plots of DVC. An editable install
    has them in its clone."""
    def run(self):
        super().run()
        if self.editable_mode: return
        to = Path(self.build_lib)/'synthscale'/'_study'
        files = [*sorted(HERE.glob('nbs/[0-9]*.ipynb')), *sorted(HERE.glob('.dvc/plots/*.json'))]
        for f in [*files, *(HERE/n for n in ('dvc.yaml', 'params.yaml', '.dvcignore'))]:
            copy = to/f.relative_to(HERE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(f, copy)

config = ConfigParser(delimiters=['='])
config.read(HERE/'settings.ini', encoding='utf-8')
c = config['DEFAULT']
extras = {k.removeprefix('extras_'): v.split() for k, v in c.items() if k.startswith('extras_')}
readme = HERE/'README.md'

setup(
    name=c['lib_name'],
    version=c['version'],
    description=c['description'],
    keywords=c['keywords'],
    author=c['author'],
    author_email=c['author_email'],
    url=c['git_url'],
    license='Apache-2.0',
    packages=find_packages(include=['synthscale*']),
    package_data={'synthscale': ['wordnet/*']},
    cmdclass={'build_py': WithStudy},
    include_package_data=True,
    python_requires=f">={c['min_python']}",
    install_requires=c['requirements'].split(),
    extras_require=extras | {'dev': c['dev_requirements'].split()},
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    entry_points={'console_scripts': c['console_scripts'].split()},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3.11', 'Programming Language :: Python :: 3.12'],
)
