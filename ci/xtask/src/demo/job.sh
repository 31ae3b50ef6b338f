# The demonstration's job: looks at its machine, runs processes side by side, writes files and checks them.

section() { printf '\n--- %s\n' "$*"; }

section "the machine"
uname -srvm
awk -F': *' '/^(model name|hypervisor_vendor)/ { print "processor:    " $2 }' /proc/cpuinfo
awk '/^(MemTotal|MemAvailable):/ { printf "%-14s%d MiB\n", $1, $2 / 1024 }' /proc/meminfo
echo "clock:        $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "devices:      $(ls /sys/bus/pci/devices | wc -l) on PCI, $(ls /sys/bus/virtio/devices | wc -l) of them virtio"
echo "up for:       $(cut -d' ' -f1 /proc/uptime) s"
echo "user:         $(id -un), in $(pwd)"

section "eight processes side by side"
for number in 1 2 3 4 5 6 7 8; do
    ( echo "process $number has the number $(exec sh -c 'echo $PPID')" ) &
done
wait

section "files and their checksums"
folder=$(mktemp -d)
for number in 1 2 3 4; do
    head -c $((number * 262144)) /dev/urandom > "$folder/$number"
done
( cd "$folder" && sha256sum 1 2 3 4 > sums && cat sums && sha256sum -c sums )
cat "$folder"/[1-4] | gzip > "$folder/all.gz"
gunzip < "$folder/all.gz" | cmp - "$(cat "$folder"/[1-4] > "$folder/all" && echo "$folder/all")"
echo "2.5 MiB went through gzip and back unchanged"

section "standard error arrives apart"
echo "this line is on standard error" >&2

if [ -n "$FAIL" ]; then
    section "failing, as asked for"
    exit 7
fi
section "done"
