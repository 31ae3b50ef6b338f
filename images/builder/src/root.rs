//! What a root file system needs to be an image's, whoever made it.

use anyhow::{Context, Result, bail};

use crate::content::Content;
use crate::kernel::Kernel;
use crate::tree::{Kind, Node, NodeId, Tree};

/// The name of every machine; the agent sets it.
const HOST_NAME: &str = "nestling";
/// Variables of every step, one `NAME=VALUE` a line; the agent reads it.
const ENVIRONMENT: &str = "etc/nestling/environment";
/// Folders that are mounted over, or that steps expect, and their modes.
const FOLDERS: [(&str, u16); 12] = [
    ("dev", 0o755),
    ("etc/nestling", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr/local/bin", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
    ("workspace", 0o755),
    ("lib/modules", 0o755),
];
/// Most bytes of a file that is looked into.
const MAX_LOOK: u64 = 1 << 20;
/// What ELF calls x86-64 and 32-bit x86, which run (gABI, `e_machine`), and others worth a name.
const RUNS: [u16; 2] = [62, 3];
const MACHINES: [(u16, &str); 4] = [(183, "64-bit ARM"), (40, "32-bit ARM"), (243, "RISC-V"), (22, "IBM Z")];

/// Makes `tree` the root of an image with `kernel`, whose steps start with `environment`.
///
/// # Errors
/// When it is no root file system, or one for other processors.
pub fn complete(tree: &mut Tree, kernel: &Kernel, environment: &[(String, String)]) -> Result<()> {
    check(tree)?;
    for (path, mode) in FOLDERS {
        tree.folder(path, mode).with_context(|| format!("/{path}"))?;
    }
    // Programs such as sudo look the machine's own name up. An archive of a container has these files empty.
    let hosts = tree.file_at("etc/hosts").map(|content| content.read(MAX_LOOK)).transpose()?;
    let mut hosts = String::from_utf8(hosts.unwrap_or_default()).context("/etc/hosts is not text")?;
    for (address, names) in
        [("127.0.0.1", "localhost"), ("127.0.1.1", HOST_NAME), ("::1", "localhost ip6-localhost")]
    {
        if !hosts.lines().any(|line| line.split_whitespace().next() == Some(address)) {
            if !hosts.is_empty() && !hosts.ends_with('\n') {
                hosts.push('\n');
            }
            hosts.push_str(&format!("{address}\t{names}\n"));
        }
    }
    replace(tree, "etc/hosts", hosts)?;
    replace(tree, "etc/hostname", format!("{HOST_NAME}\n"))?;
    // Every machine gets its own at boot.
    replace(tree, "etc/machine-id", String::new())?;
    // Whose it was does not matter in a machine, and it may be a link to what a service would write that does not run here.
    replace(tree, "etc/resolv.conf", String::new())?;
    let plain =
        |(name, value): &&(String, String)| !name.is_empty() && !name.contains('\n') && !value.contains('\n');
    let lines = environment.iter().filter(plain).map(|(name, value)| format!("{name}={value}\n"));
    replace(tree, ENVIRONMENT, lines.collect())?;
    if let Some(modules) = &kernel.modules {
        let folder = format!("lib/modules/{}", kernel.release);
        if tree.find(&folder).is_none() {
            graft(tree, &folder, modules)?;
        }
    }
    Ok(())
}

/// Refuses what steps cannot run in.
fn check(tree: &Tree) -> Result<()> {
    let Some(Kind::File(shell)) = tree.find("bin/sh").map(|id| &tree.node(id).kind) else {
        bail!("it is not a root file system that steps can run in: there is no /bin/sh in it");
    };
    let mut head = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(shell.reader()?, 20), &mut head)?;
    if let [0x7F, b'E', b'L', b'F', .., low, high] = head[..]
        && let machine = u16::from_le_bytes([low, high])
        && !RUNS.contains(&machine)
    {
        let name = MACHINES
            .iter()
            .find(|(number, _)| *number == machine)
            .map_or("another processor", |(_, name)| name);
        bail!("its programs are for {name} (/bin/sh is); machines are x86-64");
    }
    Ok(())
}

/// Puts a file where one, or a link, may be.
fn replace(tree: &mut Tree, path: &str, text: String) -> Result<()> {
    tree.remove(path.as_bytes())?;
    tree.file(path, Content::bytes(text), 0o644).map(drop)
}

/// Puts a copy of another tree at a path.
fn graft(tree: &mut Tree, place: &str, other: &Tree) -> Result<()> {
    let mut places = std::collections::HashMap::from([(Tree::ROOT, place.as_bytes().to_vec())]);
    let mut seen: std::collections::HashMap<NodeId, Vec<u8>> = std::collections::HashMap::new();
    tree.folder(place, 0o755)?;
    for (folder, name, id) in other.walk() {
        let path = [places[&folder].as_slice(), b"/", name].concat();
        if let Some(first) = seen.get(&id) {
            tree.hard_link(&path, first)?;
            continue;
        }
        let mut node: Node = other.node(id).clone();
        match &mut node.kind {
            Kind::Folder(entries) => {
                entries.clear();
                places.insert(id, path.clone());
            }
            _ => drop(seen.insert(id, path.clone())),
        }
        tree.insert(&path, node)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::bz_image;

    fn kernel() -> Kernel {
        let mut modules = Tree::new();
        modules.file("kernel/a.ko", Content::bytes("A"), 0o644).unwrap();
        Kernel { image: bz_image("6.1"), release: "6.1".into(), version: "1".into(), modules: Some(modules) }
    }

    fn root(shell: &[u8]) -> Tree {
        let mut tree = Tree::new();
        tree.folder("usr/lib", 0o755).unwrap();
        tree.insert(b"lib", Node::new(Kind::Link(b"usr/lib".to_vec()), 0o777)).unwrap();
        tree.file("usr/bin/busybox", Content::bytes(shell), 0o755).unwrap();
        tree.insert(b"bin", Node::new(Kind::Link(b"usr/bin".to_vec()), 0o777)).unwrap();
        tree.insert(b"usr/bin/sh", Node::new(Kind::Link(b"/bin/busybox".to_vec()), 0o777)).unwrap();
        tree
    }

    fn text(tree: &Tree, path: &str) -> String {
        String::from_utf8(tree.file_at(path).unwrap_or_else(|| panic!("{path}")).read(9999).unwrap()).unwrap()
    }

    #[test]
    fn a_root_gets_what_steps_expect() {
        let mut tree = root(b"#!");
        tree.insert(b"etc/resolv.conf", Node::new(Kind::Link(b"../run/resolved".to_vec()), 0o777)).unwrap();
        tree.file("etc/hosts", Content::bytes("127.0.0.1 localhost mine"), 0o644).unwrap();
        tree.file("etc/machine-id", Content::bytes("0123456789abcdef0123456789abcdef\n"), 0o444).unwrap();
        let environment = [("PATH".into(), "/opt/bin".into()), ("BAD".into(), "a\nb".into())];
        complete(&mut tree, &kernel(), &environment).unwrap();
        assert_eq!(
            text(&tree, "etc/hosts"),
            "127.0.0.1 localhost mine\n127.0.1.1\tnestling\n::1\tlocalhost ip6-localhost\n"
        );
        assert_eq!(
            (text(&tree, "etc/machine-id"), text(&tree, "etc/resolv.conf")),
            (String::new(), String::new())
        );
        assert_eq!(text(&tree, "etc/nestling/environment"), "PATH=/opt/bin\n");
        assert_eq!(text(&tree, "usr/lib/modules/6.1/kernel/a.ko"), "A");
        assert_eq!(tree.node(tree.find("tmp").unwrap()).mode, 0o1777);
    }

    #[test]
    fn what_steps_cannot_run_in_is_refused() {
        let error = complete(&mut Tree::new(), &kernel(), &[]).unwrap_err().to_string();
        assert!(error.contains("no /bin/sh"), "{error}");
        let mut arm = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0".to_vec();
        let error = complete(&mut root(&arm), &kernel(), &[]).unwrap_err().to_string();
        assert!(error.contains("64-bit ARM"), "{error}");
        arm[18] = 62;
        complete(&mut root(&arm), &kernel(), &[]).unwrap();
    }
}
