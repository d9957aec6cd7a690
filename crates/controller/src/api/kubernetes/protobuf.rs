//! OpenAPI version 2 in protocol buffers: older clients of Kubernetes take it in no other form.
//!
//! The numbers are those of gnostic's `OpenAPIv2.proto`. Only what our own document has is written.

use serde_json::Value;

/// A message under construction.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(u8::try_from(value & 0x7f).unwrap_or_default() | 0x80);
            value >>= 7;
        }
        self.0.push(u8::try_from(value).unwrap_or_default());
    }

    /// A field that has a length: wire type 2.
    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn text(mut self, field: u64, text: &Value) -> Self {
        if let Some(text) = text.as_str() {
            self.bytes(field, text.as_bytes());
        }
        self
    }

    fn texts(mut self, field: u64, texts: &Value) -> Self {
        for text in texts.as_array().into_iter().flatten() {
            self = self.text(field, text);
        }
        self
    }

    fn with(mut self, field: u64, message: &Self) -> Self {
        self.bytes(field, &message.0);
        self
    }

    /// A member of a mapping: name and value.
    fn named(self, field: u64, name: &str, value: &Self) -> Self {
        let mut pair = Self::default();
        pair.bytes(1, name.as_bytes());
        self.with(field, &pair.with(2, value))
    }

    /// `x-…`, whose values are kept as YAML, which JSON is.
    fn extensions(mut self, field: u64, of: &Value) -> Self {
        for (name, value) in of.as_object().into_iter().flatten().filter(|(name, _)| name.starts_with("x-")) {
            let mut yaml = Self::default();
            yaml.bytes(2, value.to_string().as_bytes());
            self = self.named(field, name, &yaml);
        }
        self
    }
}

/// The whole document.
pub(super) fn document(document: &Value) -> Vec<u8> {
    let info = Message::default().text(1, &document["info"]["title"]).text(2, &document["info"]["version"]);
    let mut paths = Message::default();
    for (path, item) in document["paths"].as_object().into_iter().flatten() {
        paths = paths.named(2, path, &path_item(item));
    }
    let definitions = schemas(&document["definitions"]);
    let whole = Message::default().text(1, &document["swagger"]).with(2, &info);
    whole.with(8, &paths).with(9, &definitions).0
}

fn path_item(item: &Value) -> Message {
    let methods = [("get", 2), ("put", 3), ("post", 4), ("delete", 5), ("patch", 8)];
    let there = methods.into_iter().filter(|(name, _)| item[*name].is_object());
    there.fold(Message::default(), |message, (name, field)| message.with(field, &operation(&item[name])))
}

fn operation(operation: &Value) -> Message {
    let mut message = Message::default().text(3, &operation["description"]);
    for parameter in operation["parameters"].as_array().into_iter().flatten() {
        let query = Message::default().text(2, &parameter["in"]).text(4, &parameter["name"]);
        let query = query.text(6, &parameter["type"]);
        // ParametersItem, Parameter, NonBodyParameter, QueryParameterSubSchema: each a choice of one.
        let item = [3, 2, 1].into_iter().fold(query, |inner, field| Message::default().with(field, &inner));
        message = message.with(8, &item);
    }
    let response = Message::default().text(1, &operation["responses"]["200"]["description"]);
    let responses = Message::default().named(1, "200", &Message::default().with(1, &response));
    message.with(9, &responses).extensions(13, operation)
}

fn schemas(all: &Value) -> Message {
    let all = all.as_object().into_iter().flatten();
    all.fold(Message::default(), |message, (name, one)| message.named(1, name, &schema(one)))
}

fn schema(schema: &Value) -> Message {
    let mut message = Message::default()
        .text(1, &schema["$ref"])
        .text(2, &schema["format"])
        .text(4, &schema["description"])
        .texts(19, &schema["required"]);
    if schema["additionalProperties"].is_object() {
        let inner = Message::default().with(1, &self::schema(&schema["additionalProperties"]));
        message = message.with(21, &inner);
    }
    if schema["type"].is_string() {
        message = message.with(22, &Message::default().text(1, &schema["type"]));
    }
    if schema["items"].is_object() {
        message = message.with(23, &Message::default().with(1, &self::schema(&schema["items"])));
    }
    if schema["properties"].is_object() {
        message = message.with(25, &schemas(&schema["properties"]));
    }
    message.extensions(31, schema)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn messages_are_written_as_protocol_buffers_are() {
        let text = document(&json!({
            "swagger": "2.0",
            "info": { "title": "T" },
            "definitions": { "A": { "type": "string", "x-y": [1] } },
        }));
        let expected = [
            b"\x0a\x032.0".as_slice(),
            b"\x12\x03\x0a\x01T",
            b"\x42\x00",
            // definitions { { name: "A", value: { type { value: "string" }, extension { "x-y", { yaml: "[1]" } } } } }
            b"\x4a\x21\x0a\x1f\x0a\x01A\x12\x1a\xb2\x01\x08\x0a\x06string\xfa\x01\x0c\x0a\x03x-y\x12\x05\x12\x03[1]",
        ]
        .concat();
        assert_eq!(text, expected);
    }
}
