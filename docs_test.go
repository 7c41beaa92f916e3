// The documents say what there is, and what they show works.
package holdfast_test

import (
	"encoding/json"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	holdfast "github.com/holdfast-proxy/caddy-holdfast"
)

// docs/json.md has a row for every field, and the fixture with everything has it.
func TestEveryFieldIsDocumentedAndAdapted(t *testing.T) {
	docs := read(t, "docs/json.md")
	_, fixture, _ := strings.Cut(read(t, "testdata/adapt/good/everything.caddyfiletest"), line)
	var config struct {
		Apps struct {
			Registry map[string]any `json:"connection_registry"`
			HTTP     any            `json:"http"`
			Layer4   any            `json:"layer4"`
		} `json:"apps"`
	}
	if err := json.Unmarshal([]byte(fixture), &config); err != nil {
		t.Fatal(err)
	}
	for part, c := range map[string]struct {
		of      reflect.Type
		adapted map[string]bool
	}{
		"handler":  {reflect.TypeFor[holdfast.WebSocketProxy](), handlers(config.Apps.HTTP)},
		"tunnel":   {reflect.TypeFor[holdfast.SNIPassthrough](), handlers(config.Apps.Layer4)},
		"registry": {reflect.TypeFor[holdfast.ConnectionRegistry](), paths(config.Apps.Registry)},
	} {
		for _, path := range fields(c.of, "") {
			if !strings.Contains(docs, "\n| `"+path+"` |") {
				t.Errorf("docs/json.md has no row for %s of the %s", path, part)
			}
			if !c.adapted[path] {
				t.Errorf("the fixture with everything has no %s of the %s", path, part)
			}
		}
	}
}

// The README shows all subdirectives, be it in a comment, as does the fixture with
// everything.
func TestEverySubdirectiveIsDocumented(t *testing.T) {
	fixture, _, _ := strings.Cut(read(t, "testdata/adapt/good/everything.caddyfiletest"), line)
	for _, text := range []string{strings.Join(caddyfiles(t, "README.md"), ""), fixture} {
		for directive, all := range subdirectives {
			for name := range all {
				if !regexp.MustCompile(`(?ms)^\s*` + directive + `\b[^{\n]*\{.*^\s+(?:# )?` + name + `\b`).MatchString(text) {
					t.Errorf("%s: %s is missing in %.40q…", directive, name, text)
				}
			}
		}
	}
}

// The Caddyfiles of the documents adapt. Directives that stand alone are put into a
// site, and the syntax of their arguments is left out.
func TestCaddyfilesOfDocuments(t *testing.T) {
	files, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	syntax := regexp.MustCompile(` \[<[^]]*>]`)
	for _, file := range append(files, "README.md") {
		for _, text := range caddyfiles(t, file) {
			text = syntax.ReplaceAllString(text, "")
			if before, directive, alone := strings.Cut("\n"+text, "\nwebsocket_proxy"); alone {
				text = before + "\nexample.com {\nwebsocket_proxy" + directive + "}\n"
			}
			if _, err := adapt(text); err != nil {
				t.Errorf("%s: %v in\n%s", file, err, text)
			}
		}
	}
	if len(caddyfiles(t, "README.md")) < 2 {
		t.Error("the README shows no Caddyfile")
	}
}

// The JSON of docs/json.md provisions.
func TestJSONOfDocuments(t *testing.T) {
	examples := regexp.MustCompile("(?s)\n```json\n(\\{.*?)\n```\n").FindAllStringSubmatch(read(t, "docs/json.md"), -1)
	if len(examples) < 2 {
		t.Fatal("docs/json.md shows no configs")
	}
	handler, config := examples[0][1], examples[1][1]
	for _, text := range []string{config, `{"apps":{"http":{"servers":{"s":{"routes":[{"handle":[` + handler + `]}]}}}}}`} {
		if err := provision(t, text); err != nil {
			t.Errorf("%v in\n%s", err, text)
		}
	}
}

// caddyfiles returns the Caddyfiles that a document shows.
func caddyfiles(t *testing.T, file string) (texts []string) {
	t.Helper()
	for _, match := range regexp.MustCompile("(?s)\n```caddyfile\n(.*?)\n```\n").FindAllStringSubmatch(read(t, file), -1) {
		texts = append(texts, match[1]+"\n")
	}
	return texts
}

// fields returns the paths of the JSON fields of a struct, like `upstreams[].dial`.
// Structs of other modules are one field: they are documented where they are from.
func fields(t reflect.Type, prefix string) []string {
	var all []string
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		path, of := prefix+name, f.Type
		if of.Kind() == reflect.Slice && of.Elem().Kind() == reflect.Pointer {
			path, of = path+"[]", of.Elem()
		}
		if of.Kind() == reflect.Pointer {
			of = of.Elem()
		}
		ours := of.Kind() == reflect.Struct && strings.HasPrefix(of.PkgPath(), reflect.TypeFor[holdfast.Upstream]().PkgPath())
		switch {
		case name == "" && f.Anonymous:
			all = append(all, fields(of, prefix)...)
		case name == "":
		case ours:
			all = append(all, fields(of, path+".")...)
		default:
			all = append(all, path)
		}
	}
	return all
}

// handlers returns the paths that handlers within v have.
func handlers(v any) map[string]bool {
	all := make(map[string]bool)
	add := func(more map[string]bool) {
		for path := range more {
			all[path] = true
		}
	}
	switch v := v.(type) {
	case map[string]any:
		if v["handler"] == "websocket_proxy" || v["handler"] == "sni_passthrough" {
			return paths(v)
		}
		for _, below := range v {
			add(handlers(below))
		}
	case []any:
		for _, below := range v {
			add(handlers(below))
		}
	}
	return all
}

// paths returns the paths of what is in v, as fields does.
func paths(v any) map[string]bool {
	all := make(map[string]bool)
	var walk func(v any, path string)
	walk = func(v any, path string) {
		all[path] = true
		switch v := v.(type) {
		case map[string]any:
			for name, below := range v {
				walk(below, strings.TrimPrefix(path+"."+name, "."))
			}
		case []any:
			for _, below := range v {
				walk(below, path+"[]")
			}
		}
	}
	walk(v, "")
	return all
}
