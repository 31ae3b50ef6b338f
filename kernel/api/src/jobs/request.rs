//! A job's request: from JSON to something that can run, or to a list of what is wrong with it.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::de::IgnoredAny;

use crate::agent;
use crate::bounded;
use crate::egress::Egress;
use crate::error::{ApiError, ErrorCode};
use crate::json;
use crate::types::{FieldError, Image, JobRequest, MachineConfig, StepRequest};

/// Most bytes of a name.
pub const MAX_NAME: usize = 256;
/// Most bytes of a step's script.
pub const MAX_RUN: usize = 256 * 1024;
/// Most steps of a job.
pub const MAX_STEPS: usize = bounded::MAX_LIST;
/// Most labels of a job, and most bytes of one.
pub const MAX_LABELS: usize = bounded::MAX_LIST;
/// Most globs of artifacts of a job.
pub const MAX_ARTIFACTS: usize = bounded::MAX_LIST;
/// Most bytes of a glob of artifacts.
pub const MAX_GLOB: usize = 1024;
/// Most variables of one environment.
pub const MAX_ENV: usize = bounded::MAX_ENV;
/// Most bytes of a variable's value: what Linux takes for one string (`MAX_ARG_STRLEN`) with room for the name.
pub const MAX_ENV_VALUE: usize = 127 * 1024;
/// Longest time a job or a step may ask for: a day.
pub const MAX_TIMEOUT_SECONDS: u32 = 86_400;
/// Smallest machine, in MiB.
pub const MIN_MEMORY_MIB: u32 = 64;
/// Free space a machine's disk may have, in MiB.
pub const DISK_MIB: core::ops::RangeInclusive<u32> = 16..=1 << 20;
/// A machine's memory is a multiple of this, in MiB: it is made of large pages.
pub const MEMORY_STEP_MIB: u32 = 2;
/// Most wrong fields named in one answer.
const MAX_ERRORS: usize = 20;
/// What a [`agent::RunStep`] takes on the wire besides its strings, rounded up.
const RUN_STEP_OVERHEAD: usize = 1024;

const DEFAULT_IMAGE: &str = "minimal";
const DEFAULT_TIMEOUT_SECONDS: u32 = 3600;

/// A job that can run: every default filled in, every limit checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The name for people.
    pub name: String,
    /// The image to boot; it was there when the job was accepted.
    pub image: String,
    /// Labels as sent.
    pub labels: Vec<String>,
    /// Seconds it may run.
    pub timeout_seconds: u32,
    /// The machine's size.
    pub machine_config: MachineConfig,
    /// The steps, each with a name.
    pub steps: Vec<StepRequest>,
    /// Environment of every step.
    pub env: BTreeMap<String, String>,
    /// What the machine may reach.
    pub egress: Egress,
    /// Whether the steps wait for a workspace.
    pub workspace: bool,
    /// Whether its machine boots though there is a template.
    pub cold: bool,
    /// Globs of files to keep after the last step.
    pub artifacts: Vec<String>,
}

/// Parses a request's body.
///
/// # Errors
/// [`ErrorCode::InvalidJson`] with line and column, or [`ErrorCode::ValidationFailed`] with the field's path.
pub fn parse(body: &[u8]) -> Result<JobRequest, ApiError> {
    let not_json = |what: &dyn fmt::Display| {
        ApiError::new(ErrorCode::InvalidJson, format!("the body is not valid JSON: {what}"))
    };
    core::str::from_utf8(body).map_err(|error| not_json(&error))?;
    // Once to see that it is JSON at all, without keeping any of it.
    serde_json::from_slice::<IgnoredAny>(body).map_err(|error| not_json(&error))?;
    // An array of values in the right order would pass for a struct.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(not_an_object());
    }
    json::from_slice_with_path(body).map_err(|(path, error)| wrong_field(&path, error.to_string()))
}

fn not_an_object() -> ApiError {
    let message =
        "the body must be a JSON object such as {\"steps\": [{\"run\": \"make test\"}]}".to_string();
    ApiError::validation(Vec::from([FieldError { field: String::new(), message }]))
}

fn wrong_field(path: &str, message: String) -> ApiError {
    // The parser names an unknown or missing field in its message only.
    let named = message.split('`').nth(1).filter(|_| {
        ["unknown field", "missing field", "duplicate field"].iter().any(|start| message.starts_with(start))
    });
    let parent = if path == "." { "" } else { path };
    let field = match named {
        Some(name) if parent.rsplit('.').next() != Some(name) => {
            if parent.is_empty() {
                name.to_string()
            } else {
                format!("{parent}.{name}")
            }
        }
        _ => parent.to_string(),
    };
    ApiError::validation(Vec::from([FieldError { field, message }]))
}

/// What a machine can ever get on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LargestMachine {
    /// `mem_size_mib`.
    pub memory_mib: u32,
    /// `vcpu_count`.
    pub vcpus: u32,
}

/// Checks a request against this node's limits and fills in defaults.
///
/// # Errors
/// [`ErrorCode::ValidationFailed`] with every wrong field (the first 20 of them).
pub fn plan(request: JobRequest, images: &[Image], largest: LargestMachine) -> Result<Plan, ApiError> {
    let mut check = Check::default();
    if let Some(name) = &request.name {
        check.text("name", name, MAX_NAME);
    }
    let image = request.image.unwrap_or_else(|| DEFAULT_IMAGE.to_string());
    check.image(&image, images);
    if request.labels.len() > MAX_LABELS {
        check
            .add("labels", format!("has {} entries; at most {MAX_LABELS} are allowed", request.labels.len()));
    }
    for (index, label) in request.labels.iter().enumerate().take(MAX_LABELS) {
        check.text(&format!("labels[{index}]"), label, MAX_LABELS);
    }
    check.timeout("timeout_seconds", request.timeout_seconds);
    let machine_config = request.machine_config.unwrap_or_default();
    check.machine(machine_config, largest);
    check.env("env", &request.env);
    check.steps(&request.steps, &request.env);
    check.artifacts(&request.artifacts);
    if !check.errors.is_empty() {
        return Err(ApiError::validation(check.errors));
    }
    let mut steps = request.steps;
    for step in &mut steps {
        step.name.get_or_insert_with(|| first_line(&step.run));
    }
    let first = steps.first().and_then(|step| step.name.clone());
    Ok(Plan {
        name: request.name.or(first).unwrap_or_default(),
        image,
        labels: request.labels,
        timeout_seconds: request.timeout_seconds.unwrap_or(DEFAULT_TIMEOUT_SECONDS),
        machine_config,
        steps,
        env: request.env,
        egress: request.network.unwrap_or_default().egress,
        workspace: request.workspace,
        cold: request.cold,
        artifacts: request.artifacts,
    })
}

/// A script's first line with something on it, cut to what fits a table.
fn first_line(run: &str) -> String {
    const MAX_CHARS: usize = 60;
    let line = run.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    let mut chars = line.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut name: String = chars.by_ref().take(MAX_CHARS).collect();
    if chars.next().is_some() {
        name.push('…');
    }
    name
}

/// Bytes of a string once it is JSON.
fn json_len(text: &str) -> usize {
    text.bytes().fold(2, |len, byte| {
        len.saturating_add(match byte {
            b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 8 | 12 => 2,
            0..=31 => 6,
            _ => 1,
        })
    })
}

fn json_env_len(env: &BTreeMap<String, String>) -> usize {
    env.iter()
        .fold(2, |len, (name, value)| len.saturating_add(json_len(name)).saturating_add(json_len(value) + 2))
}

#[derive(Default)]
struct Check {
    errors: Vec<FieldError>,
}

impl Check {
    fn add(&mut self, field: &str, message: impl Into<String>) {
        if self.errors.len() < MAX_ERRORS {
            self.errors.push(FieldError { field: field.to_string(), message: message.into() });
        }
    }

    fn text(&mut self, field: &str, value: &str, max: usize) {
        if value.trim().is_empty() {
            self.add(field, "must not be empty; leave it out or give a text");
        } else if value.len() > max {
            self.add(field, format!("has {} bytes; at most {max} are allowed", value.len()));
        } else if value.chars().any(char::is_control) {
            self.add(field, "must not contain control characters; give one line of text");
        }
    }

    fn image(&mut self, name: &str, images: &[Image]) {
        if images.iter().any(|image| image.name == name) {
            return;
        }
        let shown: String = name.chars().take(64).map(|c| if c.is_control() { ' ' } else { c }).collect();
        let names: Vec<_> = images.iter().map(|image| image.name.as_str()).collect();
        let known = if names.is_empty() {
            "it has none: start it with an image bundle".to_string()
        } else {
            format!("it has: {}", names.join(", "))
        };
        self.add("image", format!("there is no image '{shown}' on this node; {known}"));
    }

    fn timeout(&mut self, field: &str, seconds: Option<u32>) {
        if let Some(seconds) = seconds
            && !(1..=MAX_TIMEOUT_SECONDS).contains(&seconds)
        {
            self.add(field, format!("is {seconds}; give 1 to {MAX_TIMEOUT_SECONDS} seconds"));
        }
    }

    fn machine(&mut self, config: MachineConfig, largest: LargestMachine) {
        let LargestMachine { memory_mib: max_memory_mib, vcpus } = largest;
        if !(1..=vcpus).contains(&config.vcpu_count) {
            let message = format!("is {}; a machine on this node has 1 to {vcpus} vCPUs", config.vcpu_count);
            self.add("machine_config.vcpu_count", message);
        }
        let memory = config.mem_size_mib;
        if memory < MIN_MEMORY_MIB {
            let message = format!("is {memory}; a machine needs at least {MIN_MEMORY_MIB} MiB");
            self.add("machine_config.mem_size_mib", message);
        } else if !memory.is_multiple_of(MEMORY_STEP_MIB) {
            let message = format!("is {memory}; give a multiple of {MEMORY_STEP_MIB} MiB");
            self.add("machine_config.mem_size_mib", message);
        } else if memory > max_memory_mib {
            let message = format!("is {memory}; this node has {max_memory_mib} MiB for a machine at most");
            self.add("machine_config.mem_size_mib", message);
        }
        if let Some(disk) = config.disk_size_mib.filter(|disk| !DISK_MIB.contains(disk)) {
            let (least, most) = (DISK_MIB.start(), DISK_MIB.end());
            self.add("machine_config.disk_size_mib", format!("is {disk}; give {least} to {most} MiB"));
        }
    }

    fn artifacts(&mut self, globs: &[String]) {
        for (index, glob) in globs.iter().enumerate().take(MAX_ARTIFACTS) {
            let field = format!("artifacts[{index}]");
            let before = self.errors.len();
            self.text(&field, glob, MAX_GLOB);
            if self.errors.len() > before {
                continue;
            }
            if glob.starts_with('/') {
                self.add(
                    &field,
                    "is absolute; give a path or glob relative to the workspace, such as dist/**",
                );
            } else if glob.split('/').any(|part| part == "..") {
                self.add(&field, "has a part '..'; artifacts are files in the workspace");
            }
        }
    }

    fn env(&mut self, field: &str, env: &BTreeMap<String, String>) {
        if env.len() > MAX_ENV {
            self.add(field, format!("has {} variables; at most {MAX_ENV} are allowed", env.len()));
            return;
        }
        for (name, value) in env {
            let shown: String =
                name.chars().take(64).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
            let path = format!("{field}.{shown}");
            let mut bytes = name.bytes();
            let starts_well = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
            if !starts_well || !bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') || name.len() > MAX_NAME
            {
                let rule = "a name is letters, digits and '_', does not start with a digit";
                self.add(
                    &path,
                    format!("is no name of a variable: {rule}, and has at most {MAX_NAME} bytes"),
                );
            }
            if value.contains('\0') {
                self.add(&path, "must not contain a NUL character; an environment cannot carry one");
            } else if value.len() > MAX_ENV_VALUE {
                self.add(&path, format!("has {} bytes; at most {MAX_ENV_VALUE} are allowed", value.len()));
            }
        }
    }

    fn steps(&mut self, steps: &[StepRequest], job_env: &BTreeMap<String, String>) {
        if steps.is_empty() {
            self.add("steps", "must not be empty; give at least one step with a run command");
        }
        if steps.len() > MAX_STEPS {
            self.add("steps", format!("has {} entries; at most {MAX_STEPS} are allowed", steps.len()));
            return;
        }
        let job_env_len = json_env_len(job_env);
        for (index, step) in steps.iter().enumerate() {
            let path = format!("steps[{index}]");
            if let Some(name) = &step.name {
                self.text(&format!("{path}.name"), name, MAX_NAME);
            }
            if step.run.trim().is_empty() {
                self.add(&format!("{path}.run"), "must not be empty; give a shell command");
            } else if step.run.contains('\0') {
                self.add(
                    &format!("{path}.run"),
                    "must not contain a NUL character; a script cannot carry one",
                );
            } else if step.run.len() > MAX_RUN {
                let message = format!("has {} bytes; at most {MAX_RUN} are allowed", step.run.len());
                self.add(&format!("{path}.run"), message);
            }
            self.timeout(&format!("{path}.timeout_seconds"), step.timeout_seconds);
            self.env(&format!("{path}.env"), &step.env);
            let len = json_len(&step.run).saturating_add(job_env_len).saturating_add(json_env_len(&step.env));
            if len.saturating_add(RUN_STEP_OVERHEAD) > agent::MAX_RUN_STEP {
                let max = agent::MAX_RUN_STEP;
                self.add(
                    &path,
                    format!("its script and environment take {len} bytes as JSON; at most {max} fit"),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use serde_json::{Value, json};

    fn images() -> Vec<Image> {
        vec![Image { name: "minimal".into(), ..Image::default() }]
    }

    fn planned(request: &Value) -> Result<Plan, ApiError> {
        plan(parse(request.to_string().as_bytes())?, &images(), LargestMachine { memory_mib: 1024, vcpus: 8 })
    }

    #[track_caller]
    fn refused(request: &Value) -> Vec<(String, String)> {
        let error = planned(request).unwrap_err();
        assert_eq!(error.code, ErrorCode::ValidationFailed, "{}", error.message);
        error.errors.into_iter().map(|error| (error.field, error.message)).collect()
    }

    #[track_caller]
    fn refused_once(request: &Value, field: &str, words: &str) {
        let errors = refused(request);
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert_eq!(errors[0].0, field, "{errors:?}");
        assert!(errors[0].1.contains(words), "{errors:?}");
    }

    #[test]
    fn a_step_alone_is_a_job_with_every_default() {
        let plan = planned(&json!({"steps": [{"run": "\n  make all \nmake test"}]})).unwrap();
        assert_eq!(
            (plan.name.as_str(), plan.image.as_str(), plan.timeout_seconds),
            ("make all", "minimal", 3600)
        );
        assert_eq!(
            plan.machine_config,
            MachineConfig { vcpu_count: 1, mem_size_mib: 256, disk_size_mib: None }
        );
        assert_eq!(plan.steps[0].name.as_deref(), Some("make all"));
    }

    #[test]
    fn a_partial_machine_config_keeps_the_other_default() {
        let plan =
            planned(&json!({"steps": [{"run": "a"}], "machine_config": {"mem_size_mib": 64}})).unwrap();
        assert_eq!(
            plan.machine_config,
            MachineConfig { vcpu_count: 1, mem_size_mib: 64, disk_size_mib: None }
        );
    }

    #[test]
    fn broken_json_is_told_with_line_and_column() {
        let error = parse(b"{\n \"steps\": [}").unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidJson);
        assert!(error.message.contains("line 2 column 12"), "{}", error.message);
        assert_eq!(parse(b"").unwrap_err().code, ErrorCode::InvalidJson);
        assert_eq!(parse(b"{\"steps\":[]} x").unwrap_err().code, ErrorCode::InvalidJson);
        assert_eq!(parse(b"\xff\xfe").unwrap_err().code, ErrorCode::InvalidJson);
    }

    #[test]
    fn a_long_string_in_the_wrong_place_makes_a_short_error() {
        let long = "\u{7f}".repeat(1 << 20);
        for body in [
            format!("{{\"timeout_seconds\":\"{long}\"}}"),
            format!("{{\"{long}\":1}}"),
            format!("{{\"steps\":\"{long}\"}}"),
            format!("{{\"steps\":[{{\"run\":\"a\",\"if\":\"{long}\"}}]}}"),
            format!("{{\"env\":{{\"{long}\":1}}}}"),
            format!("\"{long}\""),
        ] {
            let error = parse(body.as_bytes()).unwrap_err();
            assert_eq!(error.code, ErrorCode::ValidationFailed);
            let field = &error.errors[0];
            assert!(
                error.message.len() + field.field.len() + field.message.len() < 4096,
                "{}",
                error.message
            );
        }
    }

    #[test]
    fn reading_ends_where_a_list_has_too_many_entries() {
        let many = |entry: &str| vec![entry; 90_000].join(",");
        let (steps, labels) = (many("{\"run\":\"\"}"), many("\"\""));
        let env = (0..90_000).map(|n| format!("\"V{n}\":\"\"")).collect::<Vec<_>>().join(",");
        for (body, field) in [
            (format!("{{\"steps\":[{steps}]}}"), "steps"),
            (format!("{{\"labels\":[{labels}]}}"), "labels"),
            (format!("{{\"env\":{{{env}}}}}"), "env"),
        ] {
            let error = parse(body.as_bytes()).unwrap_err();
            assert_eq!(error.errors[0].field, field, "{error:?}");
            assert!(error.message.contains("too many entries; at most"), "{error:?}");
        }
    }

    #[test]
    fn json_nested_without_end_is_refused() {
        let deep = [b"{\"steps\":".as_slice(), &[b'['; 100_000]].concat();
        assert!(parse(&deep).is_err());
    }

    #[test]
    fn an_unknown_field_is_named_with_its_path() {
        refused_once(
            &json!({"steps": [{"run": "a"}], "stepz": 1}),
            "stepz",
            "unknown field `stepz`, expected one of",
        );
        refused_once(&json!({"steps": [{"run": "a", "with": {}}]}), "steps[0].with", "unknown field");
        let config = json!({"steps": [{"run": "a"}], "machine_config": {"vcpus": 1}});
        refused_once(
            &config,
            "machine_config.vcpus",
            "expected one of `vcpu_count`, `mem_size_mib`, `disk_size_mib`",
        );
    }

    #[test]
    fn a_missing_field_is_named_with_its_path() {
        refused_once(&json!({}), "steps", "missing field");
        refused_once(&json!({"steps": [{"run": "a"}, {"name": "b"}]}), "steps[1].run", "missing field");
    }

    #[test]
    fn a_wrong_type_is_named_with_its_path() {
        refused_once(&json!({"steps": [{"run": 5}]}), "steps[0].run", "expected a string");
        refused_once(
            &json!({"steps": [{"run": "a"}], "timeout_seconds": -1}),
            "timeout_seconds",
            "expected u32",
        );
        refused_once(
            &json!({"steps": [{"run": "a", "env": {"A": 1}}]}),
            "steps[0].env.A",
            "expected a string",
        );
        refused_once(&json!({"steps": [{"run": "a", "if": "never()"}]}), "steps[0].if", "`always()`");
        refused_once(&json!([]), "", "must be a JSON object");
        refused_once(&json!("job"), "", "must be a JSON object");
    }

    #[test]
    fn a_field_given_twice_is_named() {
        let error = parse(br#"{"steps":[{"run":"a"}],"steps":[]}"#).unwrap_err();
        assert_eq!(error.errors[0].field, "steps", "{error:?}");
    }

    #[test]
    fn every_limit_is_told_with_its_field() {
        let step = json!({"run": "true"});
        for (request, field, words) in [
            (json!({"steps": []}), "steps", "at least one step"),
            (json!({"steps": vec![step.clone(); 101]}), "steps", "at most 100"),
            (json!({"steps": [step, {"run": " \n"}]}), "steps[1].run", "give a shell command"),
            (json!({"steps": [{"run": "a\0b"}]}), "steps[0].run", "NUL"),
            (json!({"steps": [{"run": "x".repeat(MAX_RUN + 1)}]}), "steps[0].run", "262144"),
            (json!({"steps": [step], "name": ""}), "name", "must not be empty"),
            (json!({"steps": [step], "name": "n".repeat(257)}), "name", "at most 256"),
            (json!({"steps": [step], "name": "a\nb"}), "name", "control characters"),
            (json!({"steps": [{"run": "a", "name": ""}]}), "steps[0].name", "must not be empty"),
            (
                json!({"steps": [step], "image": "debian"}),
                "image",
                "no image 'debian' on this node; it has: minimal",
            ),
            (json!({"steps": [step], "labels": vec!["l"; 101]}), "labels", "at most 100"),
            (json!({"steps": [step], "labels": ["a", ""]}), "labels[1]", "must not be empty"),
            (json!({"steps": [step], "artifacts": vec!["a"; 101]}), "artifacts", "at most 100"),
            (json!({"steps": [step], "artifacts": ["a", ""]}), "artifacts[1]", "must not be empty"),
            (json!({"steps": [step], "artifacts": ["a".repeat(1025)]}), "artifacts[0]", "at most 1024"),
            (
                json!({"steps": [step], "artifacts": ["/etc/passwd"]}),
                "artifacts[0]",
                "relative to the workspace",
            ),
            (json!({"steps": [step], "artifacts": ["a/../../b"]}), "artifacts[0]", "'..'"),
            (json!({"steps": [step], "workspace": "."}), "workspace", "expected a boolean"),
            (json!({"steps": [step], "timeout_seconds": 0}), "timeout_seconds", "give 1 to 86400"),
            (json!({"steps": [step], "timeout_seconds": 86401}), "timeout_seconds", "give 1 to 86400"),
            (json!({"steps": [{"run": "a", "timeout_seconds": 0}]}), "steps[0].timeout_seconds", "give 1 to"),
            (json!({"steps": [step], "env": {"1A": ""}}), "env.1A", "does not start with a digit"),
            (json!({"steps": [step], "env": {"": ""}}), "env.", "no name of a variable"),
            (json!({"steps": [step], "env": {"A=B": ""}}), "env.A=B", "no name of a variable"),
            (json!({"steps": [step], "env": {"A": "\0"}}), "env.A", "NUL"),
            (json!({"steps": [step], "env": {"A": "x".repeat(MAX_ENV_VALUE + 1)}}), "env.A", "at most"),
            (
                json!({"steps": [step], "machine_config": {"vcpu_count": 0}}),
                "machine_config.vcpu_count",
                "is 0; a machine on this node has 1 to 8 vCPUs",
            ),
            (
                json!({"steps": [step], "machine_config": {"vcpu_count": 9}}),
                "machine_config.vcpu_count",
                "1 to 8 vCPUs",
            ),
            (
                json!({"steps": [step], "machine_config": {"mem_size_mib": 63}}),
                "machine_config.mem_size_mib",
                "at least 64",
            ),
            (
                json!({"steps": [step], "machine_config": {"disk_size_mib": 15}}),
                "machine_config.disk_size_mib",
                "give 16 to 1048576",
            ),
            (
                json!({"steps": [step], "machine_config": {"mem_size_mib": 255}}),
                "machine_config.mem_size_mib",
                "is 255; give a multiple of 2 MiB",
            ),
            (
                json!({"steps": [step], "machine_config": {"mem_size_mib": 1026}}),
                "machine_config.mem_size_mib",
                "1024 MiB for a machine at most",
            ),
        ] {
            refused_once(&request, field, words);
        }
    }

    #[test]
    fn a_machine_may_reach_everything_unless_the_request_says_what() {
        let egress =
            |network: Value| planned(&json!({"steps": [{"run": "a"}], "network": network})).unwrap().egress;
        assert_eq!(planned(&json!({"steps": [{"run": "a"}]})).unwrap().egress, Egress::All);
        assert_eq!(egress(json!({})), Egress::All);
        assert_eq!(egress(json!({"egress": "none"})), Egress::None);
        let rules = ["example.org".parse().unwrap(), "10.0.0.0/8:22".parse().unwrap()];
        assert_eq!(egress(json!({"egress": ["Example.org", "10.0.0.0/8:22"]})), Egress::Rules(rules.into()));
    }

    #[test]
    fn a_wrong_rule_is_named_by_its_place() {
        let refused_egress = |egress: Value, field: &str, words: &str| {
            refused_once(&json!({"steps": [{"run": "a"}], "network": {"egress": egress}}), field, words);
        };
        let rules = json!(["a.org", "b.org", "c.org", "https://d.org"]);
        refused_egress(rules, "network.egress[3]", "'https://d.org' is a URL; give its host");
        refused_egress(json!(["2001:db8::/32"]), "network.egress[0]", "machines have IPv4 alone");
        refused_egress(json!(["a.org", 5]), "network.egress[1]", "expected a rule such as");
        refused_egress(json!("some"), "network.egress", "is 'some'; give \"none\", \"all\" or a list");
        refused_egress(json!(null), "network.egress", "expected \"none\", \"all\" or a list");
        refused_egress(json!(vec!["a.org"; 101]), "network.egress", "too many entries; at most 100");
        let unknown = json!({"steps": [{"run": "a"}], "network": {"ingress": []}});
        refused_once(&unknown, "network.ingress", "unknown field");
    }

    #[test]
    fn too_many_variables_are_refused() {
        let env: BTreeMap<_, _> = (0..257).map(|n| (format!("V{n}"), "")).collect();
        refused_once(&json!({"steps": [{"run": "a"}], "env": env}), "env", "at most 256");
    }

    #[test]
    fn a_step_that_would_not_fit_the_agents_frame_is_refused() {
        let value = "\u{1}".repeat(90 * 1024);
        let request = json!({"steps": [{"run": "a"}], "env": {"A": value, "B": value}});
        refused_once(&request, "steps[0]", "bytes as JSON; at most 1048576 fit");
    }

    #[test]
    fn all_wrong_fields_are_told_at_once_up_to_twenty() {
        let errors = refused(&json!({"steps": [{"run": ""}], "name": "", "timeout_seconds": 0}));
        assert_eq!(errors.len(), 3);
        let errors = refused(&json!({"steps": vec![json!({"run": ""}); 100]}));
        assert_eq!(errors.len(), MAX_ERRORS);
    }

    #[test]
    fn a_long_command_makes_a_short_name() {
        assert_eq!(first_line(&"ä".repeat(100)).chars().count(), 61);
        assert_eq!(first_line("a\tb"), "a b");
    }

    #[test]
    fn json_lengths_are_never_too_small() {
        let text: String = (0..=0x2ff_u32).filter_map(char::from_u32).collect();
        assert_eq!(json_len(&text), serde_json::to_string(&text).unwrap().len());
    }
}
