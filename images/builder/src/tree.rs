//! A root file system in memory: names, owners, modes and links, with contents that are elsewhere.
//!
//! Archives and layers are applied here instead of in a folder of this computer. So nothing they hold can lead out of the image, and
//! owners, devices and attributes need no privileges.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use crate::content::Content;

/// Longest name of a file (Linux: `NAME_MAX`).
const MAX_NAME: usize = 255;
/// Longest target of a symbolic link (Linux: `PATH_MAX` without its end).
const MAX_TARGET: usize = 4095;
/// Most symbolic links followed for one path (Linux: `MAXSYMLINKS`).
const MAX_FOLLOWED: u32 = 40;

/// A node's place in its tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(crate) usize);

/// What a node is.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A folder: names and what they stand for.
    Folder(BTreeMap<Vec<u8>, NodeId>),
    /// A regular file.
    File(Content),
    /// A symbolic link and its target.
    Link(Vec<u8>),
    /// A character device.
    CharacterDevice {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// One inode. Names that share it are hard links.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Permission bits, 0 to 0o7777.
    pub mode: u16,
    /// The owning user.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// Time of modification: seconds since 1970, nanoseconds.
    pub mtime: (i64, u32),
    /// Extended attributes by full name, such as `security.capability`.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Node {
    /// A node of root's, from the beginning of time.
    #[must_use]
    pub fn new(kind: Kind, mode: u16) -> Self {
        Self { kind, mode, uid: 0, gid: 0, mtime: (0, 0), xattrs: BTreeMap::new() }
    }

    fn folder(mode: u16) -> Self {
        Self::new(Kind::Folder(BTreeMap::new()), mode)
    }
}

/// A root file system.
#[derive(Clone, Debug)]
pub struct Tree {
    /// Nodes that no name leads to any more stay here; they are not written.
    nodes: Vec<Node>,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

/// What one component of a path led to.
enum Step {
    Folder,
    Other(NodeId),
    Missing,
}

impl Tree {
    /// The root folder.
    pub const ROOT: NodeId = NodeId(0);

    /// A tree of an empty root folder.
    #[must_use]
    pub fn new() -> Self {
        Self { nodes: vec![Node::folder(0o755)] }
    }

    /// A node.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// A node, to change it.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0]
    }

    /// Number of nodes ever made: every [`NodeId`] is less.
    pub(crate) fn capacity(&self) -> usize {
        self.nodes.len()
    }

    /// What a path leads to inside the tree, links followed as `chroot` would.
    #[must_use]
    pub fn find(&self, path: &str) -> Option<NodeId> {
        let mut stack = vec![Self::ROOT];
        match self.follow(&mut stack, path.as_bytes(), &mut MAX_FOLLOWED.clone()) {
            Step::Folder => stack.last().copied(),
            Step::Other(id) => Some(id),
            Step::Missing => None,
        }
    }

    /// The contents of the file at a path, if one is there.
    #[must_use]
    pub fn file_at(&self, path: &str) -> Option<&Content> {
        match &self.node(self.find(path)?).kind {
            Kind::File(content) => Some(content),
            _ => None,
        }
    }

    /// The names in the folder at a path.
    #[must_use]
    pub fn names(&self, path: &str) -> Option<Vec<String>> {
        let Kind::Folder(entries) = &self.node(self.find(path)?).kind else { return None };
        Some(entries.keys().map(|name| String::from_utf8_lossy(name).into_owned()).collect())
    }

    /// Every name below the root with the folder it is in, folders before what is in them, sorted by name in each folder.
    #[must_use]
    pub fn walk(&self) -> Vec<(NodeId, &[u8], NodeId)> {
        let (mut found, mut open) = (Vec::new(), vec![]);
        let children = |id: NodeId| match &self.node(id).kind {
            Kind::Folder(entries) => Some((id, entries.iter())),
            _ => None,
        };
        open.extend(children(Self::ROOT));
        while let Some((folder, entries)) = open.last_mut() {
            match entries.next() {
                Some((name, &id)) => {
                    found.push((*folder, name.as_slice(), id));
                    open.extend(children(id));
                }
                None => {
                    open.pop();
                }
            }
        }
        found
    }

    /// Puts a node at a path. A folder over a folder keeps what is in it; anything else replaces what was there. Folders above are made
    /// where they are missing; links on the way are followed inside the tree.
    ///
    /// # Errors
    /// When the path leaves the root, a name is too long, or something on the way is no folder.
    pub fn insert(&mut self, path: &[u8], node: Node) -> Result<NodeId> {
        if let Kind::Link(target) = &node.kind
            && (target.is_empty() || target.len() > MAX_TARGET || target.contains(&0))
        {
            bail!("{} is a link whose target is empty, too long or has a zero byte", shown(path));
        }
        let Some((folder, name)) = self.place(path)? else {
            let (Kind::Folder(_), Kind::Folder(_)) = (&self.nodes[0].kind, &node.kind) else {
                bail!("the root is not a folder");
            };
            self.set_attributes(Self::ROOT, node);
            return Ok(Self::ROOT);
        };
        if let Some(old) = self.child(folder, &name)
            && matches!((&self.node(old).kind, &node.kind), (Kind::Folder(_), Kind::Folder(_)))
        {
            self.set_attributes(old, node);
            return Ok(old);
        }
        let id = NodeId(self.nodes.len());
        self.nodes.push(node);
        self.entries(folder).insert(name, id);
        Ok(id)
    }

    /// Makes `path` another name of the file at `target`.
    ///
    /// # Errors
    /// As [`Tree::insert`], and when there is no such file.
    pub fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let Some((folder, name)) = self.place(target)? else {
            bail!("the target of {} is the root", shown(path))
        };
        let id = match self.child(folder, &name) {
            Some(id) if !matches!(self.node(id).kind, Kind::Folder(_)) => id,
            Some(_) => bail!("{} is a hard link to the folder {}", shown(path), shown(target)),
            None => bail!("{} is a hard link to {}, which is not there", shown(path), shown(target)),
        };
        let Some((folder, name)) = self.place(path)? else { bail!("the root cannot be a hard link") };
        self.entries(folder).insert(name, id);
        Ok(())
    }

    /// Takes a name away, with everything below it.
    ///
    /// # Errors
    /// When the path leaves the root.
    pub fn remove(&mut self, path: &[u8]) -> Result<()> {
        if let Some((folder, name)) = self.place(path)? {
            self.entries(folder).remove(&name);
        }
        Ok(())
    }

    /// Empties the folder at a path, if one is there.
    ///
    /// # Errors
    /// When the path leaves the root.
    pub fn clear(&mut self, path: &[u8]) -> Result<()> {
        let id = match self.place(path)? {
            None => Self::ROOT,
            Some((folder, name)) => match self.child(folder, &name) {
                Some(id) => id,
                None => return Ok(()),
            },
        };
        if let Kind::Folder(entries) = &mut self.node_mut(id).kind {
            entries.clear();
        }
        Ok(())
    }

    /// Makes sure there is a folder at a path; one that is there keeps its mode.
    ///
    /// # Errors
    /// As [`Tree::insert`].
    pub fn folder(&mut self, path: &str, mode: u16) -> Result<NodeId> {
        match self.find(path) {
            Some(id) if matches!(self.node(id).kind, Kind::Folder(_)) => Ok(id),
            _ => self.insert(path.as_bytes(), Node::folder(mode)),
        }
    }

    /// Puts a file of root's at a path.
    ///
    /// # Errors
    /// As [`Tree::insert`].
    pub fn file(&mut self, path: &str, content: Content, mode: u16) -> Result<NodeId> {
        self.insert(path.as_bytes(), Node::new(Kind::File(content), mode))
    }

    /// The folder a path's last name is in, and that name; none for the root itself.
    fn place(&mut self, path: &[u8]) -> Result<Option<(NodeId, Vec<u8>)>> {
        let mut names: Vec<&[u8]> = Vec::new();
        for name in components(path) {
            match name {
                b".." => bail!("{} leaves the root", shown(path)),
                name if name.len() > MAX_NAME => {
                    bail!("{} has a name longer than {MAX_NAME} bytes", shown(path))
                }
                name if name.contains(&0) => bail!("{} has a name with a zero byte", shown(path)),
                name => names.push(name),
            }
        }
        let Some(last) = names.pop() else { return Ok(None) };
        let mut stack = vec![Self::ROOT];
        let mut budget = MAX_FOLLOWED;
        for name in names {
            match self.step(&mut stack, name, &mut budget) {
                Step::Folder => {}
                Step::Missing => {
                    let folder = stack.last().copied().unwrap_or(Self::ROOT);
                    if self.child(folder, name).is_some() {
                        bail!("{} goes through a link that leads nowhere", shown(path));
                    }
                    let id = NodeId(self.nodes.len());
                    self.nodes.push(Node::folder(0o755));
                    self.entries(folder).insert(name.to_vec(), id);
                    stack.push(id);
                }
                Step::Other(_) => bail!("{} goes through something that is no folder", shown(path)),
            }
        }
        Ok(Some((stack.last().copied().unwrap_or(Self::ROOT), last.to_vec())))
    }

    fn follow(&self, stack: &mut Vec<NodeId>, path: &[u8], budget: &mut u32) -> Step {
        if path.first() == Some(&b'/') {
            stack.truncate(1);
        }
        let mut names = components(path).peekable();
        while let Some(name) = names.next() {
            match self.step(stack, name, budget) {
                Step::Folder => {}
                Step::Other(id) if names.peek().is_none() => return Step::Other(id),
                _ => return Step::Missing,
            }
        }
        Step::Folder
    }

    /// Goes from the folder on top of `stack` to `name`. After anything but a folder, the stack is where it was if `name` is no link.
    fn step(&self, stack: &mut Vec<NodeId>, name: &[u8], budget: &mut u32) -> Step {
        if name == b".." {
            if stack.len() > 1 {
                stack.pop();
            }
            return Step::Folder;
        }
        let Some(id) = stack.last().and_then(|&folder| self.child(folder, name)) else {
            return Step::Missing;
        };
        match &self.node(id).kind {
            Kind::Folder(_) => {
                stack.push(id);
                Step::Folder
            }
            Kind::Link(target) => {
                let Some(left) = budget.checked_sub(1) else { return Step::Missing };
                *budget = left;
                let before = stack.clone();
                let end = self.follow(stack, target, budget);
                if !matches!(end, Step::Folder) {
                    *stack = before;
                }
                end
            }
            _ => Step::Other(id),
        }
    }

    fn child(&self, folder: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.node(folder).kind {
            Kind::Folder(entries) => entries.get(name).copied(),
            _ => None,
        }
    }

    fn entries(&mut self, folder: NodeId) -> &mut BTreeMap<Vec<u8>, NodeId> {
        match &mut self.nodes[folder.0].kind {
            Kind::Folder(entries) => entries,
            _ => unreachable!("only folders are on a path's way"),
        }
    }

    fn set_attributes(&mut self, id: NodeId, from: Node) {
        let node = self.node_mut(id);
        (node.mode, node.uid, node.gid, node.mtime, node.xattrs) =
            (from.mode, from.uid, from.gid, from.mtime, from.xattrs);
    }
}

/// The names of a path, without empty ones and `.`.
fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".")
}

/// A path for messages.
pub(crate) fn shown(path: &[u8]) -> String {
    format!("`{}`", path.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(entries: &[(&str, &str)]) -> Tree {
        let mut tree = Tree::new();
        for (path, what) in entries {
            match what.split_once("->") {
                Some((_, target)) => {
                    tree.insert(path.as_bytes(), Node::new(Kind::Link(target.into()), 0o777)).map(drop)
                }
                None if what.is_empty() => tree.folder(path, 0o755).map(drop),
                None => tree.file(path, Content::bytes(*what), 0o644).map(drop),
            }
            .unwrap();
        }
        tree
    }

    fn text(tree: &Tree, path: &str) -> Option<String> {
        tree.file_at(path).map(|content| String::from_utf8(content.read(100).unwrap()).unwrap())
    }

    #[test]
    fn links_are_followed_inside_the_tree_only() {
        let tree = tree(&[
            ("usr/bin/dash", "shell"),
            ("bin", "->usr/bin"),
            ("usr/bin/sh", "->dash"),
            ("etc/out", "->../../../../usr/bin/sh"),
            ("etc/abs", "->/bin/sh"),
            ("loop", "->loop"),
        ]);
        for path in ["bin/sh", "/bin/../bin/./sh", "etc/out", "etc/abs", "../../bin/sh"] {
            assert_eq!(text(&tree, path).as_deref(), Some("shell"), "{path}");
        }
        for path in ["loop", "loop/x", "bin/sh/x", "missing/sh"] {
            assert!(tree.find(path).is_none(), "{path}");
        }
    }

    #[test]
    fn an_entry_below_a_link_goes_where_the_link_leads() {
        let mut tree =
            tree(&[("usr/lib", ""), ("lib", "->usr/lib"), ("etc/passwd", "p"), ("evil", "->/etc")]);
        tree.file("lib/modules/x", Content::bytes("x"), 0o644).unwrap();
        assert_eq!(text(&tree, "usr/lib/modules/x").as_deref(), Some("x"));
        tree.file("evil/passwd", Content::bytes("q"), 0o644).unwrap();
        assert_eq!(text(&tree, "etc/passwd").as_deref(), Some("q"), "the image's own, not this computer's");
    }

    #[test]
    fn a_path_that_leaves_the_root_or_goes_through_a_file_is_refused() {
        let mut tree = tree(&[("a", "file"), ("b", "->nowhere")]);
        for path in ["../x", "x/../../y", "a/x", "b/x", &"n".repeat(256), "x\0y"] {
            assert!(tree.file(path, Content::bytes(""), 0o644).is_err(), "{path}");
        }
        assert!(tree.hard_link(b"x", b"a/../a").is_err());
        assert!(tree.insert(b"l", Node::new(Kind::Link(vec![]), 0o777)).is_err());
    }

    #[test]
    fn a_folder_over_a_folder_keeps_what_is_in_it_and_a_file_over_a_folder_does_not() {
        let mut tree = tree(&[("d/f", "1")]);
        tree.insert(b"d", Node::folder(0o700)).unwrap();
        assert_eq!(
            (text(&tree, "d/f").as_deref(), tree.node(tree.find("d").unwrap()).mode),
            (Some("1"), 0o700)
        );
        tree.file("d", Content::bytes("2"), 0o644).unwrap();
        assert_eq!((text(&tree, "d").as_deref(), tree.find("d/f")), (Some("2"), None));
    }

    #[test]
    fn hard_links_are_one_node_and_need_a_file() {
        let mut tree = tree(&[("a", "1"), ("d", "")]);
        tree.hard_link(b"d/b", b"./a").unwrap();
        assert_eq!(tree.find("a"), tree.find("d/b"));
        for target in ["missing", "d", "/"] {
            assert!(tree.hard_link(b"c", target.as_bytes()).is_err(), "{target}");
        }
    }

    #[test]
    fn a_walk_meets_folders_before_what_is_in_them_however_deep() {
        let deep = vec!["d"; 5000].join("/");
        let tree = tree(&[(&format!("{deep}/f"), "1"), ("a", "2")]);
        let walk = tree.walk();
        assert_eq!(walk.len(), 5002);
        assert_eq!((walk[0].1, walk[1].1, walk[5001].1), (&b"a"[..], &b"d"[..], &b"f"[..]));
    }
}
