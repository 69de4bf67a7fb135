"""Build both images without a Docker daemon, on CPU stand-ins for their bases, and run them.

`python -m tests.container.images` makes everything in .cache/containers; what is there already is not made again.
Exit code 2, with the reason in one line, where that cannot be done here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = Path(os.environ.get("POLAR_CONTAINER_HOME", ROOT / ".cache" / "containers"))
PACKAGES = ["buildah", "debootstrap", "podman", "runc"]
# As NVIDIA's images number theirs: a pre-release, with a local part.
OTHER_TORCH = "2.14.0a0+0123456.nv26.1"
IMAGES = {"polar:eval": ("Dockerfile", "cpu"), "polar:gemma3": ("gemma3.Dockerfile", "other")}
# Must not be in an image although they lie in the folder that it is built from.
PLANTED = {
    "slurm/cluster.env": "WANDB_API_KEY=planted-secret\n",
    ".env": "HF_TOKEN=planted-secret\n",
    "polar/.netrc": "password planted-secret\n",
    "runs/first/adapter/adapter_model.safetensors": "planted weights",
    "demo/base/model.safetensors": "planted weights",
    "eval/pytorch_model.bin": "planted weights",
    ".git/config": "[credential] planted-secret\n",
}


class CannotBuild(Exception):
    """Why there can be no images on this machine."""


class BuildFailed(Exception):
    """One of the project's own files does not build."""


def build_all(progress: Callable[[str], None] = print) -> None:
    """Make bases and images.

    Raises:
        CannotBuild: no root, no packages, no base.
        BuildFailed: a Dockerfile of the project failed; the end of its log.
    """
    if os.geteuid() != 0:
        raise CannotBuild("needs root (debootstrap, chroot): run it in a container or a virtual machine")
    install_packages()
    HOME.mkdir(parents=True, exist_ok=True)
    configure_storage()
    options = pip_mounts()
    if not exists("localhost/polar-base:debian"):
        with timed("Debian base", progress):
            make_debian()
    context = HOME / "bases"
    copy_files(["requirements-torch.txt"], ROOT, context)
    copy_files(["rename_torch.py", "bases.Dockerfile"], Path(__file__).parent, context)
    for base in ("cpu", "other"):
        with timed(f"base with torch: {base}", progress):
            arguments = ["--target", base, "--build-arg", f"OTHER_VERSION={OTHER_TORCH}"]
            try:
                build(f"localhost/polar-base:{base}", context, "bases.Dockerfile", [*options, *arguments])
            except BuildFailed as error:
                raise CannotBuild(str(error)) from error
    context = make_context()
    for image, (file, base) in IMAGES.items():
        with timed(f"{image} from {file}", progress):
            arguments = ["--build-arg", f"BASE_IMAGE=localhost/polar-base:{base}", "--build-arg", "COMMIT=0123abc"]
            build(f"localhost/{image}", context, file, [*options, *arguments])


def install_packages() -> None:
    """Install what Debian has for it, where it is missing."""
    if all(shutil.which(package) for package in PACKAGES):
        return
    if shutil.which("apt-get") is None:
        raise CannotBuild(f"there is no apt-get here to install {', '.join(PACKAGES)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *PACKAGES]):
        done = run(["apt-get", *arguments], environment)
    if not all(shutil.which(package) for package in PACKAGES):
        raise CannotBuild(f"apt-get could not install {', '.join(PACKAGES)}: {last_line(done)}")


def configure_storage() -> None:
    """Write a storage.conf of this folder's own: overlay where the kernel and the file system take it, else vfs."""
    driver = "overlay"
    text = '[storage]\ndriver = "{driver}"\ngraphroot = "{home}/storage"\nrunroot = "{home}/run"\n'
    (HOME / "storage.conf").write_text(text.format(driver=driver, home=HOME))
    if run(["buildah", "images"]).returncode != 0:
        (HOME / "storage.conf").write_text(text.format(driver="vfs", home=HOME))
        done = run(["buildah", "images"])
        if done.returncode != 0:
            raise CannotBuild(f"buildah has no storage driver that works here: {last_line(done)}")


def make_debian() -> None:
    """Import a minimal Debian with Python, from the mirror that apt uses here."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    codename = release.get("VERSION_CODENAME", "").strip('"')
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {codename}", "Component: main"]
    mirrors = run(targets).stdout.split()
    if not mirrors:
        raise CannotBuild("apt-get knows no mirror of this release: run apt-get update")
    rootfs = HOME / "rootfs"
    shutil.rmtree(rootfs, ignore_errors=True)
    include = "ca-certificates,python3,python3-pip,python3-venv"
    check(["debootstrap", "--variant=minbase", f"--include={include}", codename, str(rootfs), mirrors[0]])
    shutil.rmtree(rootfs / "var/cache/apt/archives", ignore_errors=True)
    # The chroot's own list of sources is the mirror that was given; https ones need the host's certificates.
    container = check(["buildah", "from", "scratch"]).stdout.strip()
    check(["buildah", "add", "--quiet", container, str(rootfs), "/"])
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    check(["buildah", "config", "--env", path, "--cmd", "bash", container])
    check(["buildah", "commit", "--quiet", "--rm", "--format", "docker", container, "localhost/polar-base:debian"])
    shutil.rmtree(rootfs)


def pip_mounts() -> list[str]:
    """Mounts that let pip inside reach the index that pip here uses; nothing of it ends up in an image."""
    done = run([sys.executable, "-m", "pip", "config", "list"])
    settings: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "default-timeout", "timeout"):
            settings[key.removeprefix("default-")] = value.strip("'\"").replace("\\n", " ").strip()
    path = HOME / "pip.conf"
    path.touch(mode=0o600)  # an index may be named with its password
    path.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    folders = {"/etc/ssl/certs"}
    for key in ("find-links", "index-url", "extra-index-url"):
        folders |= {word.removeprefix("file://") for word in settings.get(key, "").split()}
    if "cert" in settings:
        folders.add(str(Path(settings["cert"]).parent))
    # A link of a file index may point beside it.
    folders |= {str(Path(folder).parent) for folder in folders if folder.endswith("/simple")}
    mounts = [
        f"{path}:/etc/pip.conf:ro",
        *(f"{folder}:{folder}:ro" for folder in sorted(folders) if Path(folder).is_dir()),
    ]
    return [word for mount in mounts for word in ("--volume", mount)]


def make_context() -> Path:
    """Copy the checkout's files, and plant beside them what must stay outside."""
    listed = run(["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]).stdout
    names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    context = HOME / "context"
    shutil.rmtree(context, ignore_errors=True)
    copy_files(names, ROOT, context)
    for name, text in PLANTED.items():
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text(text)
    return context


def copy_files(names: Sequence[str], source: Path, target: Path) -> None:
    """Copy files with their modes and times, so that unchanged ones leave the build's cache valid."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target / name)


def build(tag: str, context: Path, file: str, options: Sequence[str]) -> None:
    """Build one image; its log is HOME/<file>.log."""
    command = ["buildah", "bud", "--pull-never", "--isolation", "chroot", "--network", "host", "--format", "docker"]
    command += ["--layers", *options, "--file", str(context / file), "--tag", tag, str(context)]
    done = run(command)
    log = HOME / f"{tag.replace('/', '_').replace(':', '_')}.log"
    log.write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        raise BuildFailed(
            f"{tag} could not be built ({log}):\n" + "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        )


def podman(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run podman on this storage, with the runtime that works without systemd."""
    command = ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)


def exists(image: str) -> bool:
    """Whether an image of this name is in the storage."""
    return run(["buildah", "inspect", "--type", "image", image]).returncode == 0


def run(command: Sequence[str], environment_: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command on this storage and return it with its output."""
    return subprocess.run(
        list(command), env=environment_ or environment(), capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def check(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that has to work."""
    done = run(command)
    if done.returncode != 0:
        raise CannotBuild(f"{command[0]} failed: {last_line(done)}")
    return done


def environment() -> dict[str, str]:
    """The environment of every call."""
    return os.environ | {"CONTAINERS_STORAGE_CONF": str(HOME / "storage.conf"), "LC_ALL": "C.UTF-8"}


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last thing that a command said."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


@contextmanager
def timed(title: str, progress: Callable[[str], None]) -> Iterator[None]:
    """Say how long a part took."""
    start = time.perf_counter()
    yield
    progress(f"  {title:<50} {time.perf_counter() - start:4.0f} s")


if __name__ == "__main__":
    try:
        build_all(lambda line: print(line, flush=True))
    except CannotBuild as reason:
        print(reason, file=sys.stderr)
        sys.exit(2)
    except BuildFailed as reason:
        print(reason, file=sys.stderr)
        sys.exit(1)
