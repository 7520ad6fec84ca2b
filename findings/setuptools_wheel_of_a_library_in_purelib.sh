#!/usr/bin/env bash
# setuptools: a wheel made "not pure" by bdist_wheel.root_is_pure = False still has all its files, libraries too, in purelib; auditwheel refuses it.
#
# A package that ships a compiled library but no extension module gets a platform tag by this setting, the usual recipe. One would guess that
# the wheel is then a platform wheel throughout: its name and "Root-Is-Purelib: false" say so, and pip installs it where it belongs. But the
# distribution still counts as pure, so its files go to NAME.data/purelib/ inside the wheel, and `auditwheel repair`, which makes a manylinux
# wheel of it, ends with "Invalid binary wheel". Distribution.has_ext_modules() that returns True puts the files at the root and sets the tag.
#
# Seen: setuptools 84.2.1 and 77.0.3, auditwheel 6.8.2, as below. Needs python3 with pip and venv, x86-64 Linux with glibc; nothing is compiled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cd "$folder"
mkdir package
touch package/__init__.py
cp "$(ls /lib/x86_64-linux-gnu/libm.so.6 /lib64/libm.so.6 2> /dev/null | head -n 1)" package/library.so # any shared library
setup() { # how the wheel is told that it is for one platform
  cat > setup.py <<PY
from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel


class NotPure(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False


class WithLibrary(Distribution):
    def has_ext_modules(self):
        return True


setup(name="package", version="1", packages=["package"], package_data={"package": ["*.so"]}, $1)
PY
  rm -rf build wheel
  venv/bin/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir wheel . 2> /dev/null
}
for setuptools in 77.0.3 84.2.1; do
  venv/bin/pip install --quiet "setuptools==$setuptools" auditwheel==6.8.2
  setup 'cmdclass={"bdist_wheel": NotPure}'
  venv/bin/python -m zipfile --list wheel/*.whl > names
  venv/bin/auditwheel show wheel/*.whl > said 2>&1 && exit 1
  echo "setuptools $setuptools, root_is_pure = False: $(grep -o 'package-1.data/purelib/package/library.so' names), $(grep -o 'Invalid binary wheel' said)"
  setup 'distclass=WithLibrary'
  venv/bin/python -m zipfile --list wheel/*.whl > names
  venv/bin/auditwheel show wheel/*.whl > said 2>&1
  echo "setuptools $setuptools, has_ext_modules: $(grep -o '^package/library.so' names), $(grep -o 'is consistent' said)"
done
