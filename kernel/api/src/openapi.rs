//! The API's description for programs and people.

/// What `GET /openapi.json` gives: OpenAPI 3.1. Its errors' documentation is under `x-error-codes`.
pub const OPENAPI: &str = include_str!("openapi.json");

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use alloc::string::{String, ToString};
    use alloc::vec;
    use alloc::vec::Vec;
    use serde::Serialize;
    use serde_json::{Value, json};

    use crate::egress::{self, Egress};
    use crate::error::{ApiError, ErrorCode};
    use crate::jobs::JobStore;
    use crate::testing::*;
    use crate::types::*;
    use crate::{Limits, Node, router};

    fn document() -> Value {
        serde_json::from_str(OPENAPI).unwrap()
    }

    fn keys(object: &Value) -> BTreeSet<String> {
        object.as_object().unwrap().keys().cloned().collect()
    }

    /// What is wrong with a value by a schema, in the part of JSON Schema that the document uses.
    fn check(document: &Value, schema: &Value, value: &Value, path: &str, wrong: &mut Vec<String>) {
        if let Some(reference) = schema["$ref"].as_str() {
            let schema = document.pointer(reference.trim_start_matches('#')).unwrap();
            return check(document, schema, value, path, wrong);
        }
        if let Some(one_of) = schema["oneOf"].as_array() {
            let fits = one_of.iter().any(|schema| {
                let mut wrong = vec![];
                check(document, schema, value, path, &mut wrong);
                wrong.is_empty()
            });
            if !fits {
                wrong.push(alloc::format!("{path}: {value} is none of those"));
            }
            return;
        }
        let types: Vec<_> = match &schema["type"] {
            Value::String(one) => vec![one.as_str()],
            Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
            _ => vec![],
        };
        let is = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(number) if number.is_f64() => "number",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        let fits = types.contains(&is) || is == "integer" && types.contains(&"number");
        if !types.is_empty() && !fits {
            wrong.push(alloc::format!("{path}: {value} is no {types:?}"));
        }
        if let Some(allowed) = schema["enum"].as_array()
            && !allowed.contains(value)
        {
            wrong.push(alloc::format!("{path}: {value} is not in {allowed:?}"));
        }
        if let Some(items) = value.as_array() {
            for (index, item) in items.iter().enumerate() {
                check(document, &schema["items"], item, &alloc::format!("{path}[{index}]"), wrong);
            }
        }
        if let (Some(members), Some(properties)) = (value.as_object(), schema["properties"].as_object()) {
            for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                if !members.contains_key(name) {
                    wrong.push(alloc::format!("{path}.{name} is required"));
                }
            }
            for (name, member) in members {
                match properties.get(name) {
                    Some(schema) => check(document, schema, member, &alloc::format!("{path}.{name}"), wrong),
                    None => wrong.push(alloc::format!("{path}.{name} is not described")),
                }
            }
        }
    }

    /// The value fits its schema, and the schema describes nothing that the value does not have.
    #[track_caller]
    fn fits<T: Serialize>(schema: &str, value: &T) {
        let (document, value) = (document(), serde_json::to_value(value).unwrap());
        let schema = &document["components"]["schemas"][schema];
        let mut wrong = vec![];
        check(&document, schema, &value, "", &mut wrong);
        assert_eq!(wrong, Vec::<String>::new());
        assert_eq!(keys(&schema["properties"]), keys(&value));
    }

    fn job() -> Job {
        let mut jobs = JobStore::new(Limits::default());
        let files =
            JobRequest { workspace: true, artifacts: vec!["a".into()], ..steps(vec![step("a"), step("b")]) };
        let job = begin(&mut jobs, 1, files, at(0));
        let sender = jobs.open_workspace(job, None).unwrap();
        jobs.push_workspace(&sender, b"tar").unwrap();
        jobs.end_workspace(&sender);
        say(&mut jobs, job, &unpacked(1), at(0));
        say(&mut jobs, job, &started(0), at(0));
        say(&mut jobs, job, &stdout("x"), at(0));
        say(&mut jobs, job, &exited(0, 1), at(0));
        say(&mut jobs, job, &listed(&[]), at(0));
        finish(&mut jobs, job, at(0))
    }

    #[test]
    fn every_path_of_the_router_is_described_with_its_methods() {
        let document = document();
        let described: BTreeSet<_> = keys(&document["paths"]);
        let served: BTreeSet<_> = router::PATHS.iter().map(|path| path.template.to_string()).collect();
        assert_eq!(described, served);
        for path in &router::PATHS {
            let described = &document["paths"][path.template];
            let methods: BTreeSet<_> =
                path.allow.split(", ").filter(|method| *method != "HEAD").map(str::to_lowercase).collect();
            let mut found = keys(described);
            found.remove("parameters");
            assert_eq!(found, methods, "{}", path.template);
            for method in methods {
                let public = described[&method]["security"] == json!([]);
                assert_eq!(public, path.public, "{}", path.template);
            }
        }
    }

    #[test]
    fn every_error_code_is_described_with_its_status() {
        let document = document();
        let codes: BTreeSet<_> = ErrorCode::ALL.iter().map(|code| code.as_str().to_string()).collect();
        assert_eq!(keys(&document["x-error-codes"]), codes);
        for code in ErrorCode::ALL {
            let pointer = ApiError::new(code, "").body().documentation_url;
            let described = document.pointer(pointer.strip_prefix("/openapi.json#").unwrap()).unwrap();
            assert_eq!(described["status"], code.status());
            assert!(described["description"].as_str().is_some_and(|text| text.ends_with('.')));
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn walk(document: &Value, value: &Value) {
            if let Some(reference) = value["$ref"].as_str() {
                assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
            }
            match value {
                Value::Array(items) => items.iter().for_each(|item| walk(document, item)),
                Value::Object(members) => members.values().for_each(|member| walk(document, member)),
                _ => {}
            }
        }
        let document = document();
        walk(&document, &document);
    }

    #[test]
    fn what_the_node_says_fits_its_schema() {
        let job = job();
        fits("Job", &job);
        fits("Step", &job.steps[0]);
        fits("Timings", &job.timings);
        fits("JobMemory", &job.memory);
        fits("LogInfo", &job.log);
        fits("Network", &job.network);
        fits("ConnectionCounts", &job.connections);
        fits("Workspace", &job.workspace);
        fits("Artifacts", &job.artifacts);
        let listed = Artifact { name: "a/b".into(), size: 1 };
        fits("Artifact", &listed);
        let list = ArtifactList {
            status: ArtifactsStatus::Ready,
            total_count: 2,
            total_bytes: 3,
            omitted_count: 1,
            message: None,
            artifacts: vec![listed],
        };
        fits("ArtifactList", &list);
        let connection = Connection {
            time: job.created_at.clone(),
            protocol: Protocol::Tcp,
            name: None,
            address: Some("192.0.2.7".into()),
            port: Some(443),
            bytes_sent: 1,
            bytes_received: 2,
            verdict: Verdict::Allowed,
            reason: None,
        };
        fits("Connection", &connection);
        fits(
            "ConnectionList",
            &ConnectionList { connections: vec![connection], ..ConnectionList::default() },
        );
        fits("JobList", &JobList { total_count: 1, jobs: vec![job] });
        let host = FakeNode::new().host();
        fits("HostMemory", &host.memory);
        fits("BootTimes", &host.boot);
        fits("Uplink", &Uplink::default());
        fits("Host", &host);
        fits("Image", &Image::default());
        fits("ImageList", &ImageList::default());
        fits("Template", &Template::default());
        fits("TemplateList", &TemplateList { total_count: 1, templates: vec![Template::default()] });
        fits("Version", &Version { name: "nestling".into(), version: "1".into(), api: "v1".into() });
        let error = FieldError { field: "a".into(), message: "b".into() };
        fits("FieldError", &error);
        fits("Error", &ApiError::validation(vec![error]).body());
    }

    #[test]
    fn what_the_node_takes_fits_its_schema() {
        let step = StepRequest {
            name: Some("a".into()),
            run: "b".into(),
            env: [("A".to_string(), "b".to_string())].into(),
            timeout_seconds: Some(1),
            condition: Some(Condition::Always),
        };
        fits("StepRequest", &step);
        fits("MachineConfig", &MachineConfig { disk_size_mib: Some(100), ..MachineConfig::default() });
        let request = JobRequest {
            name: Some("a".into()),
            image: Some("b".into()),
            labels: vec!["c".into()],
            timeout_seconds: Some(1),
            machine_config: Some(MachineConfig::default()),
            steps: vec![step],
            env: [("A".to_string(), "b".to_string())].into(),
            network: Some(Network { egress: Egress::Rules(vec!["example.org".parse().unwrap()]) }),
            workspace: true,
            artifacts: vec!["dist/**".into()],
            cold: true,
        };
        fits("JobRequest", &request);
    }

    #[test]
    fn limits_and_defaults_are_the_ones_that_hold() {
        use crate::jobs::request;
        let document = document();
        let schemas = &document["components"]["schemas"];
        let (job, step) = (&schemas["JobRequest"]["properties"], &schemas["StepRequest"]["properties"]);
        assert_eq!(job["name"]["maxLength"], request::MAX_NAME);
        assert_eq!(job["labels"]["maxItems"], request::MAX_LABELS);
        assert_eq!(job["steps"]["maxItems"], request::MAX_STEPS);
        assert_eq!(job["timeout_seconds"]["maximum"], request::MAX_TIMEOUT_SECONDS);
        assert_eq!(step["run"]["maxLength"], request::MAX_RUN);
        assert_eq!(schemas["Environment"]["maxProperties"], request::MAX_ENV);
        assert_eq!(schemas["Environment"]["additionalProperties"]["maxLength"], request::MAX_ENV_VALUE);
        assert_eq!(job["artifacts"]["maxItems"], request::MAX_ARTIFACTS);
        assert_eq!(job["artifacts"]["items"]["maxLength"], request::MAX_GLOB);
        let rules = &schemas["Network"]["properties"]["egress"]["oneOf"][1];
        assert_eq!(rules["maxItems"], egress::MAX_RULES);
        let machine = &schemas["MachineConfig"]["properties"];
        let default = MachineConfig::default();
        assert_eq!(machine["mem_size_mib"]["minimum"], request::MIN_MEMORY_MIB);
        assert_eq!(machine["mem_size_mib"]["default"], default.mem_size_mib);
        assert_eq!(machine["vcpu_count"]["default"], default.vcpu_count);
        assert_eq!(machine["disk_size_mib"]["minimum"], *request::DISK_MIB.start());
        assert_eq!(machine["disk_size_mib"]["maximum"], *request::DISK_MIB.end());
    }

    #[test]
    fn the_documents_version_is_the_crates() {
        assert_eq!(document()["info"]["version"], env!("CARGO_PKG_VERSION"));
    }
}
