//! In which form objects are answered: whole, as a table, or as metadata only.

use std::convert::Infallible;

use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;
use bulkhead_model::columns::{cells, headings, text};
use serde_json::{Value, json};

use super::place::Place;

/// The group of tables.
const META: &str = "meta.k8s.io";

/// A form that a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Whole,
    Table,
    Metadata,
}

/// The form that a client asks for, and its version.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Form {
    shape: Shape,
    version: &'static str,
    /// Whether rows of a table carry whole objects.
    whole_rows: bool,
}

impl<S: Send + Sync> FromRequestParts<S> for Form {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        let accept = parts.headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
        let whole_rows = parts.uri.query().is_some_and(|query| query.contains("includeObject=Object"));
        Ok(Self::of(accept.unwrap_or_default(), whole_rows))
    }
}

impl Form {
    /// The first of a list of media types that there is; what nobody knows is answered whole.
    fn of(accept: &str, whole_rows: bool) -> Self {
        let whole = Self { shape: Shape::Whole, version: "v1", whole_rows };
        for media_type in accept.split(',') {
            let mut parts = media_type.split(';').map(str::trim);
            if !matches!(parts.next(), Some("application/json" | "*/*" | "application/*")) {
                continue;
            }
            let parameters: Vec<(&str, &str)> = parts.filter_map(|part| part.split_once('=')).collect();
            let of = |name| parameters.iter().find(|(key, _)| *key == name).map(|(_, value)| *value);
            let shape = match of("as") {
                None => return whole,
                Some(_) if of("g") != Some(META) => continue,
                Some("Table") => Shape::Table,
                Some("PartialObjectMetadata" | "PartialObjectMetadataList") => Shape::Metadata,
                Some(_) => continue,
            };
            let version = match of("v") {
                Some("v1") => "v1",
                Some("v1beta1") => "v1beta1",
                _ => continue,
            };
            return Self { shape, version, whole_rows };
        }
        whole
    }

    fn api_version(self) -> String {
        format!("{META}/{}", self.version)
    }

    /// One object in this form.
    pub(crate) fn object(self, place: &Place, object: Value) -> Value {
        match self.shape {
            Shape::Whole => object,
            Shape::Metadata => self.metadata(&object),
            Shape::Table => {
                let version = object["metadata"]["resourceVersion"].clone();
                self.table(place, &[object], &json!({ "resourceVersion": version }))
            }
        }
    }

    /// A list in this form.
    pub(crate) fn list(self, place: &Place, items: &[Value], metadata: &Value) -> Value {
        let (version, kind) = place.list_type();
        match self.shape {
            Shape::Whole => {
                json!({ "apiVersion": version, "kind": kind, "metadata": metadata, "items": items })
            }
            Shape::Metadata => json!({
                "apiVersion": self.api_version(),
                "kind": "PartialObjectMetadataList",
                "metadata": metadata,
                "items": items.iter().map(|item| self.metadata(item)).collect::<Vec<_>>(),
            }),
            Shape::Table => self.table(place, items, metadata),
        }
    }

    /// The object of a bookmark, in this form.
    pub(crate) fn bookmark(self, place: &Place, metadata: &Value) -> Value {
        match self.shape {
            Shape::Table => self.table(place, &[], metadata),
            Shape::Whole | Shape::Metadata => {
                let (version, kind) = place.object_type();
                json!({ "apiVersion": version, "kind": kind, "metadata": metadata })
            }
        }
    }

    fn metadata(self, object: &Value) -> Value {
        json!({
            "apiVersion": self.api_version(),
            "kind": "PartialObjectMetadata",
            "metadata": object["metadata"],
        })
    }

    fn table(self, place: &Place, items: &[Value], metadata: &Value) -> Value {
        let columns = headings(place.kind).iter().enumerate().map(|(index, heading)| {
            // Clients write headings in capitals themselves, and look for the one that is the name.
            let format = if index == 0 { "name" } else { "" };
            let description = heading.to_ascii_lowercase();
            json!({
                "name": title(heading), "type": "string", "format": format, "description": description, "priority": 0,
            })
        });
        let rows = items.iter().map(|item| {
            let mut row = vec![text(item, "/metadata/name")];
            row.extend(cells(place.kind, item));
            let object = if self.whole_rows { item.clone() } else { self.metadata(item) };
            json!({ "cells": row, "object": object })
        });
        json!({
            "apiVersion": self.api_version(),
            "kind": "Table",
            "metadata": metadata,
            "columnDefinitions": columns.collect::<Vec<_>>(),
            "rows": rows.collect::<Vec<_>>(),
        })
    }
}

/// `DEFAULT ACTION` as `Default Action`.
fn title(heading: &str) -> String {
    let words = heading.split(' ').map(|word| match word.split_at_checked(1) {
        Some((first, rest)) => format!("{first}{}", rest.to_ascii_lowercase()),
        None => String::new(),
    });
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_known_form_is_taken() {
        for (accept, shape, version) in [
            ("", Shape::Whole, "v1"),
            ("application/json", Shape::Whole, "v1"),
            ("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", Shape::Table, "v1"),
            ("application/json;as=Table;v=v1beta1;g=meta.k8s.io", Shape::Table, "v1beta1"),
            ("application/json;as=Table;v=v7;g=meta.k8s.io, application/json", Shape::Whole, "v1"),
            (
                "application/vnd.kubernetes.protobuf;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,\
                 application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
                Shape::Metadata,
                "v1",
            ),
        ] {
            let form = Form::of(accept, false);
            assert_eq!((form.shape, form.version), (shape, version), "{accept}");
        }
    }
}
