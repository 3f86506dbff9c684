"Package metadata, read from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
c = config['DEFAULT']
extras = {k.removeprefix('extras_'): v.split() for k, v in c.items() if k.startswith('extras_')}
readme = Path(__file__).with_name('README.md')

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
