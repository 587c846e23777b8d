# Runs outside, for the new tree in $1: leaves containerd's packages of the Debian releases before and after 13 in
# /katavm-lab of the tree. apt's own state for them is beside the packages, and goes again.
set -eu
cd "$1/katavm-lab"
mkdir -p apt/lists/partial apt/archives/partial
for suite in bookworm forky; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $suite main" >apt/sources.list
    set -- -q -o "Dir::Etc::SourceList=$PWD/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o "Dir::State::Lists=$PWD/apt/lists" -o "Dir::Cache=$PWD/apt" -o APT::Architecture=amd64 \
        -o APT::Sandbox::User=root -o Acquire::Languages=none
    apt-get "$@" update
    apt-get "$@" download "containerd/$suite"
done
rm -rf apt
