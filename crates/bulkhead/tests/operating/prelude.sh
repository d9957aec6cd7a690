# Runs what docs/operating.md says on a machine of its own: other mounts, network, processes and name, and all that is
# written goes into memory. Called with the directory of the binary and of deploy/, and the script.
set -eu
scratch=$(mktemp -d)
mount -t tmpfs bulkhead-operating "$scratch"
trap 'umount -l "$scratch"; rmdir "$scratch"' EXIT
mkdir "$scratch/upper" "$scratch/work" "$scratch/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$scratch/upper,workdir=$scratch/work" "$scratch/root"
root=$scratch/root
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t bpf bpf "$root/sys/fs/bpf"
mount --rbind /dev "$root/dev"
for of_its_own in run tmp; do mount -t tmpfs bulkhead-operating "$root/$of_its_own"; done
mkdir "$root/src"
cp -r "$1/." "$root/src"
hostname web1
printf '127.0.0.1 localhost web1 c1 c2 c1.example.org c2.example.org c3.example.org relay.site1.example.org\n' > "$root/etc/hosts"
ip link set lo up
for address in 10.0.0.1 10.0.0.2 10.0.0.3; do ip address add "$address/32" dev lo; done
chroot "$root" bash /src/script.sh
