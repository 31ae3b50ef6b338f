//! Images with their root on a disk: what `nestling image build` makes, boots.

use nestling::bed::{Bed, BedBuilder};
use nestling::client::types::{Conclusion, JobRequest};
use nestling_tests::disk_image;
use nestling_tests::job::{job, run};
use nestling_tests::node::Shared;

static NODE: Shared = Shared::new(builder);

fn builder() -> BedBuilder {
    Bed::builder().store(disk_image::store())
}

/// Standard output of a job in the image with a disk that succeeds.
fn output(script: &str) -> String {
    output_of(&JobRequest { image: Some(disk_image::NAME.to_owned()), ..job(script) })
}

fn output_of(request: &JobRequest) -> String {
    let finished = run(NODE.get(), request);
    assert_eq!(finished.job.conclusion, Some(Conclusion::Success), "{finished:?}");
    String::from_utf8(finished.stdout).unwrap()
}

#[test]
fn a_node_has_the_images_of_its_store_beside_those_of_its_boot_module() {
    let images = NODE.get().client().images().unwrap().images;
    let names: Vec<&str> = images.iter().map(|image| image.name.as_str()).collect();
    assert_eq!(names, [disk_image::NAME, "minimal"]);
}

#[test]
fn the_root_is_a_disk_that_has_grown_and_can_be_filled() {
    let text = output(
        "awk '$2 == \"/\" {print $1, $3}' /proc/mounts | tail -n 1
         df -m / | awk 'NR == 2 {print $2, $4}'
         dd if=/dev/zero of=/tmp/zeros bs=1M count=64 2>/dev/null; stat -f -c %T /tmp
         tr '\\0' x </dev/zero | dd of=/var/x bs=1M count=100 iflag=fullblock 2>/dev/null
         sync; echo 3 >/proc/sys/vm/drop_caches; tr -d x </var/x | wc -c; wc -c </var/x",
    );
    let lines: Vec<&str> = text.lines().collect();
    let [root, sizes, tmp, others, len] = lines[..] else { panic!("{text}") };
    assert_eq!((root, others.trim(), len.trim()), ("/dev/vda ext4", "0", "104857600"), "{text}");
    assert!(tmp.contains("ext"), "/tmp has the disk's room: {tmp}");
    let sizes: Vec<u32> = sizes.split(' ').map(|size| size.parse().unwrap()).collect();
    assert!(sizes[0] > disk_image::FREE_MIB && sizes[1] > disk_image::FREE_MIB - 32, "{sizes:?}");
}

#[test]
fn modules_load_by_themselves_and_what_containers_need_is_there() {
    let text = output(
        "cd /tmp; mkdir lower upper work merged; echo below >lower/file
         mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged && cat merged/file
         for module in veth bridge br_netfilter nf_tables nft_compat xt_MASQUERADE xt_addrtype xt_conntrack; do
             modprobe $module || echo no $module
         done
         mkdir /sys/fs/cgroup/container
         for controller in cpu memory pids io; do
             grep -qw $controller /sys/fs/cgroup/container/cgroup.controllers || echo no $controller
         done
         echo $$ >/sys/fs/cgroup/container/cgroup.procs && cat /proc/self/cgroup",
    );
    assert_eq!(text, "below\n0::/container\n");
}

#[test]
fn a_step_finds_the_names_variables_and_folders_it_expects() {
    let text = output(
        "hostname; grep -c nestling /etc/hosts; echo $LANG $HOME $PWD; wc -c </etc/machine-id
         ls -d /dev/pts/ptmx /dev/shm /run /root; stat -c %a /tmp; ls /usr/lib/modules | wc -l
         (sleep 0.1 &); sleep 0.5; ps -o stat | grep -c Z || true",
    );
    let expected =
        "nestling\n1\nC.UTF-8 /root /workspace\n33\n/dev/pts/ptmx\n/dev/shm\n/root\n/run\n1777\n1\n0\n";
    assert_eq!(text, expected);
}

#[test]
fn what_a_machine_writes_is_gone_with_it_and_so_is_its_id() {
    let write = "echo written >/root/file; cat /etc/machine-id; ls /root";
    let on_disk = |script| output_of(&JobRequest { image: Some(disk_image::NAME.to_owned()), ..job(script) });
    let (first, second) = (on_disk(write), on_disk("cat /etc/machine-id; ls /root; echo end"));
    let (id, rest) = first.split_once('\n').unwrap();
    assert_eq!(rest, "file\n");
    let (other, rest) = second.split_once('\n').unwrap();
    assert_eq!(rest, "end\n");
    assert_ne!(id, other);
}

/// `cargo xtask image debian && cargo test -p nestling-tests --test boots debian -- --ignored`.
#[test]
#[ignore = "the image takes minutes to build, the first time"]
fn debian_compiles_and_runs_a_program_as_root_and_by_sudo() {
    let node = nestling_tests::node::ready(Bed::builder().store(disk_image::debian_store()));
    let script = "git --version; gcc --version | head -n 1; echo 'int main() { return 42; }' >x.c
        cc -O2 x.c -o x; ./x || echo $?; sudo id -un; python3 -c 'print(6 * 7)'; locale 2>/dev/null | grep -c C.UTF-8 || true";
    let request = JobRequest { image: Some("debian".to_owned()), ..job(script) };
    let finished = run(&node, &request);
    let text = String::from_utf8_lossy(&finished.stdout);
    let lines: Vec<&str> = text.lines().collect();
    let [git, gcc, "42", "root", "42", _] = lines[..] else { panic!("{finished:?}") };
    assert!(git.starts_with("git version") && gcc.contains("Debian"), "{text}");
}
