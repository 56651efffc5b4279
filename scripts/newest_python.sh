#!/bin/sh
# Prints the newest supported Python that starts and can make a virtual environment; nothing where there is none.
# A name on the PATH may be a version manager's stub that does not start, so their own folders are looked into too.

data=${XDG_DATA_HOME:-$HOME/.local/share}

try() {
	[ -f "$1" ] && [ -x "$1" ] && "$1" -c \
		'import ctypes, ensurepip, ssl, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		>/dev/null 2>&1 </dev/null && echo "$1" && exit
}

for name in python3.13 python3.12 python3.11 python3 python; do
	IFS=:
	for folder in $PATH; do
		try "$folder/$name"
	done
	unset IFS
	for folder in \
		"${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin \
		"${ASDF_DATA_DIR:-$HOME/.asdf}"/installs/python/*/bin \
		"${MISE_DATA_DIR:-$data/mise}"/installs/python/*/bin \
		"${UV_PYTHON_INSTALL_DIR:-$data/uv/python}"/*/bin \
		"$HOME"/*conda3/bin "$HOME"/*forge*/bin /opt/*conda*/bin \
		"$HOME"/*conda3/envs/*/bin "$HOME"/*forge*/envs/*/bin /opt/*conda*/envs/*/bin "$HOME"/.conda/envs/*/bin; do
		try "$folder/$name"
	done
done
exit 0
