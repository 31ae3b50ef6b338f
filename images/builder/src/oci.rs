//! OCI images in a layout on this computer's disk (OCI image-spec 1.1: image-layout.md, manifest.md, config.md, layer.md), as `skopeo copy`
//! and `buildah push` write them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::archive::{self, Entry};
use crate::tree::Tree;

/// Most bytes of a manifest, index or configuration.
const MAX_JSON: u64 = 4 << 20;
/// Most indexes that lead from one to another.
const MAX_INDEXES: u32 = 4;
/// The annotation that has a manifest's tag.
const TAG: &str = "org.opencontainers.image.ref.name";

/// What an image says about running it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Variables, in order.
    pub env: Vec<(String, String)>,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    platform: Option<Platform>,
}

#[derive(Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

impl Descriptor {
    /// Whether this may be an image for the machines.
    fn fits(&self) -> bool {
        self.platform.as_ref().is_none_or(|its| its.architecture == "amd64" && its.os == "linux")
    }
}

/// What a reference to an image leads to.
#[derive(Deserialize)]
#[serde(untagged)]
enum Document {
    Manifest(Manifest),
    Index(Index),
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Configuration {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    config: Option<RunConfiguration>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RunConfiguration {
    env: Option<Vec<String>>,
}

/// Adds the layers of the image `tag` (or of the only one) in the layout at `folder` to `tree`.
///
/// # Errors
/// When this is no layout, the image is not there or not for Linux on x86-64, or a blob is missing, damaged or not as its digest says.
pub(crate) fn add(tree: &mut Tree, folder: &Path, tag: Option<&str>, scratch: &Path) -> Result<Config> {
    let layout = Layout { folder };
    let manifest = layout.manifest(tag)?;
    let configuration: Configuration = layout.json(&manifest.config)?;
    let (os, architecture) = (configuration.os.as_str(), configuration.architecture.as_str());
    if (os, architecture) != ("linux", "amd64") {
        bail!("the image is for {os}/{architecture}; machines are linux/amd64");
    }
    for layer in &manifest.layers {
        let told = || format!("the layer {}", layer.digest);
        if !layer.media_type.contains("tar") {
            bail!("the layer {} has the media type {}, which is no archive", layer.digest, layer.media_type);
        }
        let blob = layout.blob(layer).with_context(told)?;
        let entries = archive::entries(blob, scratch).with_context(told)?;
        apply_layer(tree, entries).with_context(told)?;
    }
    let env = configuration.config.and_then(|config| config.env).unwrap_or_default();
    let env = env.iter().filter_map(|setting| setting.split_once('='));
    Ok(Config { env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).collect() })
}

/// A layout's folder.
struct Layout<'a> {
    folder: &'a Path,
}

impl Layout<'_> {
    fn manifest(&self, tag: Option<&str>) -> Result<Manifest> {
        let path = self.folder.join("index.json");
        let mut text = Vec::new();
        let file = File::open(&path).with_context(|| {
            format!("{} is no OCI image layout: it has no index.json", self.folder.display())
        })?;
        file.take(MAX_JSON).read_to_end(&mut text)?;
        let index: Index =
            serde_json::from_slice(&text).with_context(|| format!("{} is not an index", path.display()))?;
        let tags = || {
            let tags: Vec<_> =
                index.manifests.iter().filter_map(|one| one.annotations.get(TAG)).cloned().collect();
            if tags.is_empty() {
                "none has a tag".to_owned()
            } else {
                format!("there is: {}", tags.join(", "))
            }
        };
        let mut descriptor = match (tag, index.manifests.as_slice()) {
            (None, [only]) => only.clone(),
            (None, []) => bail!("{} holds no image", self.folder.display()),
            (None, _) => {
                bail!("{} holds several images; name one with oci:DIR:TAG; {}", self.folder.display(), tags())
            }
            (Some(tag), all) => all
                .iter()
                .find(|one| one.annotations.get(TAG).is_some_and(|other| other == tag))
                .with_context(|| format!("{} has no image {tag}; {}", self.folder.display(), tags()))?
                .clone(),
        };
        for _ in 0..=MAX_INDEXES {
            match self.json(&descriptor)? {
                Document::Manifest(manifest) => return Ok(manifest),
                Document::Index(index) => {
                    let mut variants = index.manifests.into_iter();
                    descriptor = variants
                        .find(Descriptor::fits)
                        .context("the image has no variant for linux/amd64")?;
                }
            }
        }
        bail!("the index leads to too many others")
    }

    fn json<T: for<'a> Deserialize<'a>>(&self, descriptor: &Descriptor) -> Result<T> {
        if descriptor.size > MAX_JSON {
            bail!("the blob {} has {} bytes, too many for a description", descriptor.digest, descriptor.size);
        }
        let mut text = Vec::new();
        self.blob(descriptor)?.read_to_end(&mut text)?;
        serde_json::from_slice(&text)
            .with_context(|| format!("the blob {} is not what it should be", descriptor.digest))
    }

    /// Opens a blob whose bytes are as its digest says.
    fn blob(&self, descriptor: &Descriptor) -> Result<File> {
        let digest = &descriptor.digest;
        let hex = digest.strip_prefix("sha256:").unwrap_or_default();
        if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            bail!("{digest:?} is no SHA-256 digest");
        }
        let path = self.folder.join("blobs/sha256").join(hex);
        let mut file =
            File::open(&path).with_context(|| format!("the blob {} is missing", path.display()))?;
        if file.metadata()?.len() != descriptor.size {
            bail!(
                "the blob {digest} has {} bytes instead of {}: it is cut off or damaged",
                file.metadata()?.len(),
                descriptor.size
            );
        }
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                len => hash.update(&buffer[..len]),
            }
        }
        if crate::hex(&hash.finalize()) != hex.to_ascii_lowercase() {
            bail!("the blob {digest} is damaged: its digest is another");
        }
        file.seek(io::SeekFrom::Start(0))?;
        Ok(file)
    }
}

/// Applies a layer: first what it takes away from those below it (`.wh.NAME` a name, `.wh..wh..opq` all that is in a folder), then what it adds.
fn apply_layer(tree: &mut Tree, entries: Vec<Entry>) -> Result<()> {
    const WHITEOUT: &[u8] = b".wh.";
    let (whiteouts, added): (Vec<_>, Vec<_>) =
        entries.into_iter().partition(|entry| split(&entry.path).1.starts_with(WHITEOUT));
    for entry in whiteouts {
        let (folder, name) = split(&entry.path);
        match &name[WHITEOUT.len()..] {
            b".wh..opq" => tree.clear(folder)?,
            // Others that begin so are the storage driver's own.
            name if name.starts_with(WHITEOUT) || name.is_empty() || name == b"." => {}
            name => tree.remove(&[folder, b"/", name].concat())?,
        }
    }
    archive::apply(tree, added)
}

/// A path's folder and its last name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let end = path.iter().rposition(|&byte| byte != b'/').map_or(0, |last| last + 1);
    match path[..end].iter().rposition(|&byte| byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..end]),
        None => (b"", &path[..end]),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{archive, tool};

    /// A layout being written.
    struct Written(tempfile::TempDir);

    impl Written {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            fs::create_dir_all(folder.path().join("blobs/sha256")).unwrap();
            Self(folder)
        }

        fn path(&self, digest: &str) -> PathBuf {
            self.0.path().join("blobs/sha256").join(&digest["sha256:".len()..])
        }

        fn blob(&self, kind: &str, bytes: &[u8]) -> Value {
            let digest = format!("sha256:{}", crate::hex(&Sha256::digest(bytes)));
            fs::write(self.path(&digest), bytes).unwrap();
            json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": bytes.len()})
        }

        fn image(&self, architecture: &str, layers: &[(&str, Vec<u8>)]) -> Value {
            let config = json!({"os": "linux", "architecture": architecture, "config": {"Env": ["PATH=/opt/bin", "A=b=c", "odd"]}});
            let config = self.blob("config.v1+json", config.to_string().as_bytes());
            let layers: Vec<_> = layers.iter().map(|(kind, bytes)| self.blob(kind, bytes)).collect();
            self.blob(
                "manifest.v1+json",
                json!({"schemaVersion": 2, "config": config, "layers": layers}).to_string().as_bytes(),
            )
        }

        fn index(&self, manifests: &[Value]) {
            fs::write(self.0.path().join("index.json"), json!({"manifests": manifests}).to_string()).unwrap();
        }

        fn read(&self, tag: Option<&str>) -> Result<(Tree, Config)> {
            let mut tree = Tree::new();
            add(&mut tree, self.0.path(), tag, self.0.path()).map(|config| (tree, config))
        }

        fn error(&self, tag: Option<&str>) -> String {
            format!("{:#}", self.read(tag).unwrap_err())
        }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        tool(&["gzip", "-c"], bytes)
    }

    fn tagged(mut manifest: Value, tag: &str) -> Value {
        manifest["annotations"] = json!({TAG: tag});
        manifest
    }

    fn names(tree: &Tree, path: &str) -> Vec<String> {
        tree.names(path).unwrap()
    }

    #[test]
    fn layers_add_replace_and_take_away() {
        let layout = Written::new();
        let lower = archive(&[
            ("etc/", ""),
            ("etc/a", "1"),
            ("etc/b", "1"),
            ("d/x", "1"),
            ("d/y", "1"),
            ("f/g/h", "1"),
            ("lib", "->usr/lib"),
        ]);
        // The whiteouts come last and still touch only what is below.
        let middle = archive(&[
            ("etc/a", "2"),
            ("d/new", "2"),
            ("d/.wh..wh..opq", ""),
            ("etc/.wh.b", ""),
            ("f/.wh.g", ""),
            ("usr/lib/", ""),
        ]);
        let upper = archive(&[("lib/c", "3"), ("etc/.wh.missing", ""), (".wh..wh.plnk", "")]);
        let layers = [
            ("layer.v1.tar", lower),
            ("layer.v1.tar+gzip", gzip(&middle)),
            ("layer.v1.tar+zstd", tool(&["zstd", "-c"], &upper)),
        ];
        layout.index(&[layout.image("amd64", &layers)]);
        let (tree, config) = layout.read(None).unwrap();
        assert_eq!(names(&tree, "etc"), ["a"]);
        assert_eq!(tree.file_at("etc/a").unwrap().read(9).unwrap(), b"2");
        assert_eq!(
            (names(&tree, "d"), names(&tree, "f"), names(&tree, "usr/lib")),
            (vec!["new".into()], vec![], vec!["c".into()])
        );
        assert_eq!(config.env, [("PATH".into(), "/opt/bin".into()), ("A".into(), "b=c".into())]);
    }

    #[test]
    fn an_image_is_chosen_by_tag_and_by_platform() {
        let layout = Written::new();
        let image = |name: &str, architecture| {
            layout.image(architecture, &[("layer.v1.tar", archive(&[(name, "x")]))])
        };
        let mut variants = [image("arm", "arm64"), image("intel", "amd64")];
        variants[0]["platform"] = json!({"architecture": "arm64", "os": "linux"});
        variants[1]["platform"] = json!({"architecture": "amd64", "os": "linux"});
        let index = layout.blob("index.v1+json", json!({"manifests": variants}).to_string().as_bytes());
        layout.index(&[
            tagged(index, "multi"),
            tagged(image("one", "amd64"), "one"),
            tagged(image("arm", "arm64"), "arm"),
        ]);
        assert_eq!(names(&layout.read(Some("multi")).unwrap().0, "/"), ["intel"]);
        assert_eq!(names(&layout.read(Some("one")).unwrap().0, "/"), ["one"]);
        assert!(layout.error(Some("arm")).contains("linux/arm64"));
        assert!(layout.error(Some("two")).contains("there is: multi, one, arm"));
        assert!(layout.error(None).contains("oci:DIR:TAG"));
    }

    #[test]
    fn a_damaged_missing_or_misnamed_blob_is_told() {
        let layout = Written::new();
        let bytes = archive(&[("a", "x")]);
        let manifest = layout.image("amd64", &[("layer.v1.tar", bytes.clone())]);
        layout.index(&[manifest]);
        let path = layout.path(&format!("sha256:{}", crate::hex(&Sha256::digest(&bytes))));
        let mut other = bytes.clone();
        other[0] ^= 1;
        fs::write(&path, &other).unwrap();
        assert!(layout.error(None).contains("damaged"));
        fs::write(&path, &bytes[..512]).unwrap();
        assert!(layout.error(None).contains("cut off"));
        fs::remove_file(&path).unwrap();
        assert!(layout.error(None).contains("missing"));
        layout.index(&[json!({"digest": "sha256:../../../etc/passwd", "size": 1})]);
        assert!(layout.error(None).contains("no SHA-256 digest"));
        fs::remove_file(layout.0.path().join("index.json")).unwrap();
        assert!(layout.error(None).contains("no OCI image layout"));
    }

    #[test]
    fn a_layer_that_leads_out_of_the_image_is_refused_and_links_lead_nowhere_else() {
        let layout = Written::new();
        for (path, expected) in [("../evil", "leaves the root"), ("../.wh.x", "leaves the root")] {
            layout.index(&[layout.image("amd64", &[("layer.v1.tar", archive(&[(path, "x")]))])]);
            assert!(layout.error(None).contains(expected), "{path}: {}", layout.error(None));
        }
        let lower = archive(&[("out", "->/tmp"), ("tmp/kept", "x")]);
        layout.index(&[layout.image(
            "amd64",
            &[("layer.v1.tar", lower), ("layer.v1.tar", archive(&[("out/.wh.kept", ""), ("out/new", "y")]))],
        )]);
        let (tree, _) = layout.read(None).unwrap();
        assert_eq!(names(&tree, "tmp"), ["new"]);
    }
}
