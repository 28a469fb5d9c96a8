#!/usr/bin/env bash
# Build the image and train in it, without a registry of images or a docker daemon: on a Debian of
# debootstrap, once as it is and once with a torch in it, as PyTorch's images have one.
#
# As root, with buildah, podman, runc and debootstrap. It takes minutes and 8 GB in ${TMPDIR:-/var/tmp},
# and leaves nothing there. Where pip would bring torch with CUDA, it takes several GB more.
set -euo pipefail
cd "$(dirname "$0")/../.."

for tool in buildah podman runc debootstrap; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install buildah podman runc debootstrap" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "debootstrap and runc need root" >&2; exit 2; }

work=$(mktemp -d "${TMPDIR:-/var/tmp}/dti-container.XXXX")
export TMPDIR=$work
storage=(--root "$work/images" --runroot "$work/run" --storage-driver overlay)
buildah() { nice buildah "${storage[@]}" "$@"; }
podman() { command podman "${storage[@]}" --runtime runc --cgroup-manager cgroupfs "$@"; }

clean_up() {
  podman rm --all --force --time 0 >/dev/null 2>&1 || true
  umount --recursive "$work/images/overlay" 2>/dev/null || true
  rm -rf --one-file-system "$work"
}
trap clean_up EXIT

step() { printf '== %4d s  %s\n' "$SECONDS" "$*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }

# The build sees pip as it is set up here: its configuration, and every file and folder that it names.
# An index's links may lead to its neighbours.
pip_volumes() {
  local place
  {
    printf '%s\n' /etc/pip.conf /etc/xdg/pip "$HOME/.pip" "$HOME/.config/pip"
    python3 -m pip config list | grep -oE "(file://)?/[^' ]+" | sed -E 's|^file://(.*)/[^/]+/?$|\1|'
  } | sort -u | while read -r place; do
    if [ -e "$place" ]; then printf -- '--volume=%s:%s:ro\n' "$place" "$place"; fi
  done
}
mapfile -t volumes < <(pip_volumes)

build() {  # BASE TAG
  buildah bud --isolation chroot --layers --build-arg BASE_IMAGE="$1" \
    --build-arg REVISION="$(git rev-parse HEAD)" "${volumes[@]}" \
    --file docker/Dockerfile --tag "$2" . >"$work/build.log" 2>&1 \
    || { tail -50 "$work/build.log"; fail "build of $2"; }
}

size() { podman image inspect --format '{{.Size}}' "$1" | numfmt --to=iec; }

# In every container of the test: what `docker run` would get, and limits that fit one machine.
workspace=$work/workspace
install --directory --mode 1777 "$workspace"
options=(--network host --ulimit nofile=20000:20000 --ulimit nproc=1024:1024
  --volume "$workspace:/workspace" --env OMP_NUM_THREADS=1)
run() { podman run --rm "${options[@]}" "$@"; }
trained() { find "$workspace/$1" -path '*/step-*/commit.json' | wc -l; }

recipe=/opt/dti-dist/share/dti-dist/recipes/demo.yaml
train() { printf '%s\n' train "$recipe" "run_dir=runs/$1" training.log_every=1 validation.max_targets=200 "training.max_steps=$2"; }

step "base: debootstrap"
# With ca-certificates, which could not be installed over a file of certificates that pip names.
debootstrap --variant=minbase --include=ca-certificates bookworm "$work/debian" >"$work/debootstrap.log" \
  || { tail "$work/debootstrap.log"; fail debootstrap; }
tar --directory "$work/debian" --create . | podman import --quiet - localhost/debian >/dev/null
rm -rf --one-file-system "$work/debian"

step "build on a base without torch"
build localhost/debian localhost/dti-dist
step "built: $(size localhost/dti-dist), base $(size localhost/debian)"

# Layers are taken as they are: the build depends on nothing that differs from one to the next.
before=$SECONDS
build localhost/debian localhost/dti-dist
step "built again in $((SECONDS - before)) s"

[ "$(run localhost/dti-dist id --user)" = 10001 ] || fail "the container runs as root"
[ "$(run localhost/dti-dist --version)" = "$(run localhost/dti-dist dti-dist --version)" ] \
  || fail "with and without the word dti-dist"
run localhost/dti-dist bash -c '! ls -a /src | grep -E "^(\.git|\.venv|data|runs|tests)$"' \
  || fail "what .dockerignore names is in the image"
# An orphan that ends is waited for by pid 1, which it is then a child of.
run localhost/dti-dist bash -c '(sleep 0.1 & ); sleep 1; ! grep --quiet "^State:.Z" /proc/[0-9]*/status' \
  || fail "zombies"

step "two ranks train two steps, as user 10001"
run localhost/dti-dist prepare synthetic --out data/demo >"$work/prepare.log" 2>&1 \
  || { cat "$work/prepare.log"; fail prepare; }
mapfile -t command < <(train two 2)
run --env NPROC_PER_NODE=2 localhost/dti-dist dti-dist "${command[@]}" 2>&1 | tee "$work/two.log"
grep --quiet "2 rank(s) on cpu" "$work/two.log" || fail "not two ranks"
[ "$(trained runs/two)" -ge 1 ] || fail "no complete checkpoint"

step "podman stop"
mapfile -t command < <(train stopped 40)
podman run --detach --name job "${options[@]}" --env NPROC_PER_NODE=2 localhost/dti-dist "${command[@]}" >/dev/null
until grep --quiet '"step": 3' "$workspace/runs/stopped/metrics.jsonl" 2>/dev/null; do
  [ "$(podman inspect --format '{{.State.Running}}' job)" = true ] || { podman logs job; fail "it ended early"; }
  sleep 0.5
done
before=$SECONDS
podman stop --time 120 job >/dev/null
code=$(podman inspect --format '{{.State.ExitCode}}' job)
podman logs job 2>&1 | grep -v Traceback | grep "stopped by a signal" || { podman logs job; fail "no word of the stop"; }
[ "$code" = 75 ] || { podman logs job; fail "exit code $code, expected 75"; }
[ "$(trained runs/stopped)" -ge 1 ] || fail "no complete checkpoint"
step "stopped in $((SECONDS - before)) s with exit code $code"
podman rm job >/dev/null

step "the same command goes on"
run --env NPROC_PER_NODE=2 localhost/dti-dist "${command[@]}" 2>&1 | tee "$work/on.log" | grep -E "resuming from" \
  || fail "it did not go on"
grep --quiet '"step": 40' "$workspace/runs/stopped/metrics.jsonl" || fail "it did not reach the end"

step "another user, who has no account there"
chmod --recursive a+rwX "$workspace"
mapfile -t command < <(train other 1)
run --user 4321:4321 localhost/dti-dist "${command[@]}" >"$work/other.log" 2>&1 \
  || { tail -30 "$work/other.log"; fail "as user 4321"; }

step "build on a base with torch"
torch=$(grep '^torch==' constraints.txt)
buildah bud --isolation chroot "${volumes[@]}" --tag localhost/debian-torch --file - . >"$work/torch.log" 2>&1 <<END || { tail -30 "$work/torch.log"; fail "the base with torch"; }
FROM localhost/debian
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv && apt-get clean && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /pip && /pip/bin/pip --python /usr/bin/python3 install --no-cache-dir --break-system-packages '$torch' numpy && rm -r /pip
END
build localhost/debian-torch localhost/dti-dist-torch
step "built: $(size localhost/dti-dist-torch), base $(size localhost/debian-torch)"
run localhost/dti-dist-torch python -c 'import torch; print(torch.__file__)' | tee "$work/torch"
grep --quiet ^/usr/local/ "$work/torch" || fail "the base's torch was not kept"
mapfile -t command < <(train torch 2)
run --env NPROC_PER_NODE=2 localhost/dti-dist-torch "${command[@]}" >"$work/torch.log" 2>&1 \
  || { tail -50 "$work/torch.log"; fail "training with the base's torch"; }
[ "$(trained runs/torch)" -ge 1 ] || fail "no complete checkpoint"

step "done"
