"""Errors: images of registries and archives, and their import."""

from __future__ import annotations

from enclos.runtime.errors.error import ADMIN, AdminError, EnclosError, UserError, reason
from enclos.runtime.errors.images import image_as


def bad_image_reference(reference: str, detail: str) -> EnclosError:
    """Neither a path nor a reference."""
    return UserError(
        image_as(reference),
        "no such kind of image",
        detail,
        "give docker://REGISTRY/NAME:TAG, /PATH or ./PATH; see enclos-srun(1)",
    )


def local_image_missing(reference: str) -> EnclosError:
    """The archive or layout does not exist on this node."""
    return UserError(
        image_as(reference),
        "image not found",
        hint="archives and layouts are looked up on the compute node; is the path on a shared file system?",
    )


def registry_unknown(reference: str, registry: str) -> EnclosError:
    """The registry's name has no address."""
    return UserError(
        image_as(reference),
        f"no such registry: {registry}",
        "its name has no address",
        "is the name right? 'docker://NAME' alone means Docker Hub",
    )


def registry_unreachable(reference: str, registry: str, cause: str) -> EnclosError:
    """No connection to the registry."""
    return UserError(
        image_as(reference),
        f"cannot reach the registry {registry}",
        cause,
        "can this node reach it? 'enclos image pull' on a login node may help",
        transient=True,
    )


def registry_busy(reference: str, registry: str, cause: str) -> EnclosError:
    """It answers that it cannot, or that this user or address has asked too often."""
    return UserError(
        image_as(reference),
        f"the registry {registry} does not serve it now",
        cause,
        "try again later; where pulls are counted, as on Docker Hub, 'skopeo login' allows more of them",
        transient=True,
    )


def registry_tls(reference: str, registry: str, cause: str) -> EnclosError:
    """The registry's certificate is not trusted, or it speaks no TLS."""
    return AdminError(
        image_as(reference),
        f"no secure connection to the registry {registry}",
        cause,
        f"{ADMIN}trust its certificate in /etc/containers/certs.d/{registry}, or mark it insecure in registries.conf",
    )


def registry_lost(reference: str, registry: str) -> EnclosError:
    """The connection ended in the middle."""
    return UserError(
        image_as(reference),
        f"lost the connection to the registry {registry}",
        hint="run it again: layers that are complete are kept",
        transient=True,
    )


def image_unknown(reference: str, registry: str) -> EnclosError:
    """The registry does not have the name, the tag or the digest."""
    return UserError(
        image_as(reference),
        "image not found",
        f"the registry {registry} has no such name or tag",
        "check name and tag; many registries also say this of images that you may not see",
    )


def image_unauthorized(reference: str, registry: str) -> EnclosError:
    """The registry refuses, with the user's credentials or without."""
    return UserError(
        image_as(reference),
        "not allowed to pull the image",
        f"the registry {registry} refuses",
        f"'skopeo login {registry}' stores your credentials; they have to be in your home on the compute node too",
        transient=True,
    )


def image_no_platform(reference: str, detail: str) -> EnclosError:
    """An index without an image for this kind of node."""
    return UserError(image_as(reference), "image is not for this kind of node", detail, "choose another tag")


def image_digest_mismatch(reference: str, wanted: str = "", found: str = "") -> EnclosError:
    """What came is not what its digest says."""
    return UserError(
        image_as(reference),
        "image does not match its digest",
        f"wanted {wanted[:19]}…, got {found[:19]}…" if wanted else "",
        "possibly a damaged registry or proxy; it was not used",
    )


def image_policy(reference: str) -> EnclosError:
    """policy.json of the node rejects the image."""
    return UserError(
        image_as(reference),
        "image is rejected by the policy of this site",
        "/etc/containers/policy.json",
        "use an image that is signed as the site wants it",
    )


def image_bad_manifest(reference: str, detail: str) -> EnclosError:
    """The manifest or the configuration cannot be used."""
    return UserError(image_as(reference), "image cannot be used", detail, "build or push it again")


def layer_bad(reference: str, digest: str, detail: str) -> EnclosError:
    """A layer is no archive, or holds what no image may hold."""
    subject = f"layer {digest[7:19]} of the image" if digest else "a layer of the image"
    return UserError(image_as(reference), f"{subject} is not usable", detail, "build the image again")


def image_too_large(reference: str, detail: str, setting: str) -> EnclosError:
    """A limit of the site."""
    return UserError(
        image_as(reference), "image is larger than the site allows", detail, f"{ADMIN}{setting} in enclos.yaml"
    )


def store_full(reference: str) -> EnclosError:
    """No space, or no quota, where images are kept."""
    return AdminError(
        image_as(reference),
        "no space left for images",
        "disk or quota is full",
        "in a store of yours: 'enclos image rm' and 'enclos image gc'; "
        f"{ADMIN}imports.cache_directory and imports.cache_size in enclos.yaml",
    )


def store_failed(reference: str, directory: str, number: int) -> EnclosError:
    """The cache cannot be written to."""
    return AdminError(
        image_as(reference),
        f"cannot write to the image cache {directory}",
        reason(number),
        f"{ADMIN}imports.cache_directory in enclos.yaml",
    )


def store_not_roots(reference: str, directory: str, detail: str) -> EnclosError:
    """Somebody else than root can put images into the node's cache."""
    return AdminError(
        image_as(reference),
        f"the image cache {directory} is not root's alone",
        detail,
        f"{ADMIN}stop enclosd, remove that, and let enclosd make it; or another imports.cache_directory",
    )


def import_failed(reference: str, detail: str) -> EnclosError:
    """An import failed for a reason that has no text of its own."""
    return UserError(image_as(reference), "image cannot be imported", detail, "administrator: journalctl -u enclosd")


def import_timed_out(reference: str, seconds: int) -> EnclosError:
    """imports.deadline_seconds."""
    return UserError(
        image_as(reference),
        f"the import took longer than {seconds} s",
        hint="run it again: layers that are complete are kept; administrator: imports.deadline_seconds",
        transient=True,
    )


def program_missing(name: str) -> EnclosError:
    """A program or library that imports need is not installed."""
    what = "library" if ".so" in name else "program"
    return AdminError("images", f"the {what} {name} is not installed", hint=f"{ADMIN}install it; see 'enclos check'")


def job_unknown(job: str) -> EnclosError:
    """`enclos image pull --job`: slurmctld does not know it, or does not tell this user of it."""
    return UserError(f"--job={job}", "no such job", hint="'squeue --me' lists yours")


def job_not_own(job: str) -> EnclosError:
    """Its images are fetched with its user's credentials, so root cannot do it as root either."""
    return UserError(
        f"--job={job}",
        "it is another user's",
        hint=f"{ADMIN}runuser -l USER -c 'enclos image pull --job={job}': with his credentials, into his store",
    )


def job_without_image(job: str) -> EnclosError:
    """Nothing that Slurm shows of the job names an image."""
    return UserError(
        f"--job={job}",
        "it names no image",
        "searched its batch script, and its command line where Slurm shows that",
        "write '#SBATCH --container-image=IMAGE' into the script, or pull IMAGE by its name",
    )
