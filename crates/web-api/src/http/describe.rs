//! What the generated description cannot say by itself.

use serde_json::{Map, Value, json};

/// Says of each number how large it may be, and of parameters that they are there or not: none is `null`.
pub(super) fn complete(document: &mut Value) {
    bound(document);
    let paths = document.get_mut("paths").and_then(Value::as_object_mut);
    let operations = paths.into_iter().flat_map(Map::values_mut);
    for operation in operations
        .filter_map(Value::as_object_mut)
        .flat_map(Map::values_mut)
    {
        let parameters = operation.get_mut("parameters");
        let parameters = parameters.and_then(Value::as_array_mut);
        for parameter in parameters.into_iter().flatten() {
            if let Some(kind) = parameter.pointer_mut("/schema/type")
                && let Some([one, _]) = kind.as_array().map(Vec::as_slice)
            {
                *kind = one.clone();
            }
        }
    }
}

/// The bounds of formats: a reader of the description need not know them, and a validator does not.
fn bound(value: &mut Value) {
    match value {
        Value::Object(members) => {
            if let Some(bounds) = members.get("format").and_then(bounds) {
                for (name, bound) in bounds {
                    members.entry(name).or_insert(bound);
                }
            }
            members.values_mut().for_each(bound);
        }
        Value::Array(items) => items.iter_mut().for_each(bound),
        _ => {}
    }
}

fn bounds(format: &Value) -> Option<Map<String, Value>> {
    let (least, most) = match format.as_str()? {
        "int32" => (json!(i32::MIN), json!(i32::MAX)),
        "u-int8" => (json!(0), json!(u8::MAX)),
        "u-int16" => (json!(0), json!(u16::MAX)),
        "u-int32" => (json!(0), json!(u32::MAX)),
        "u-int64" => (json!(0), json!(u64::MAX)),
        _ => return None,
    };
    let bounds = [("minimum".to_owned(), least), ("maximum".to_owned(), most)];
    Some(bounds.into_iter().collect())
}
