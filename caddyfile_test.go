// The Caddyfile syntax, good and bad, by fixtures.
package holdfast_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/holdfast-proxy/caddy-holdfast"
)

var update = flag.Bool("update", false, "rewrite the JSON of the good fixtures")

// A good fixture is a Caddyfile, a line of dashes, and the JSON it adapts to,
// which must also provision.
func TestAdaptGood(t *testing.T) {
	for _, file := range fixtures(t, "good") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			const line = "\n----------\n"
			input, want, _ := strings.Cut(read(t, file), line)
			input = strings.TrimRight(input, "\n")
			got, err := adapt(input)
			if err != nil {
				t.Fatal(err)
			}
			if *update {
				if err := os.WriteFile(file, []byte(input+"\n"+line+got), 0o600); err != nil {
					t.Fatal(err)
				}
				want = got
			}
			if got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			if err := provision(t, got); err != nil {
				t.Errorf("provisioning: %v", err)
			}
		})
	}
}

// A bad fixture begins with a comment that has a part of the error, which comes
// when the Caddyfile is adapted, or at the latest when it is provisioned.
func TestAdaptBad(t *testing.T) {
	for _, file := range fixtures(t, "bad") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			input := read(t, file)
			first, _, _ := strings.Cut(input, "\n")
			want, ok := strings.CutPrefix(first, "# error: ")
			if !ok {
				t.Fatal("the fixture does not say its error")
			}
			config, err := adapt(input)
			if err == nil {
				err = provision(t, config)
			}
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error: got %v, want one with %q", err, want)
			}
		})
	}
}

// A config that only says what is the default adapts and provisions like one
// that says nothing, and JSON takes durations as strings.
func TestJSONWithoutCaddyfile(t *testing.T) {
	err := provision(t, `{"apps":{"http":{"servers":{"s":{"listen":["127.0.0.1:0"],"routes":[{"handle":[{
		"handler":"websocket_proxy","upstreams":[{"dial":"app:8080"}],
		"transport":{"dial_timeout":"3s","handshake_timeout":"10s"},
		"keep_alive":{"ping_interval":"30s","idle_timeout":0},"compression":"on"}]}]}}}}}`)
	if err != nil {
		t.Error(err)
	}
}

// What JSON can say and a Caddyfile cannot is refused all the same.
func TestJSONErrors(t *testing.T) {
	for name, c := range map[string]struct{ handler, want string }{
		"no upstream":     {`{"handler":"websocket_proxy"}`, "no upstreams"},
		"empty address":   {`{"handler":"websocket_proxy","upstreams":[{}]}`, `upstream "": empty address`},
		"unknown field":   {`{"handler":"websocket_proxy","upstream":[]}`, "upstream"},
		"unknown policy":  {`{"handler":"websocket_proxy","upstreams":[{"dial":"a:1"}],"load_balancing":{"selection_policy":{"policy":"first"}}}`, `unknown lb_policy "first"`},
		"zero dial":       {`{"handler":"websocket_proxy","upstreams":[{"dial":"a:1"}],"transport":{"dial_timeout":0}}`, "dial_timeout must be positive"},
		"bad compression": {`{"handler":"websocket_proxy","upstreams":[{"dial":"a:1"}],"compression":"brotli"}`, `unknown compression mode "brotli"`},
	} {
		t.Run(name, func(t *testing.T) {
			err := provision(t, `{"apps":{"http":{"servers":{"s":{"listen":["127.0.0.1:0"],"routes":[{"handle":[`+c.handler+`]}]}}}}}`)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error: got %v, want one with %q", err, c.want)
			}
		})
	}
}

// adapt returns the indented JSON of a Caddyfile.
func adapt(input string) (string, error) {
	config, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(input), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return "", err
	}
	for _, w := range warnings {
		if !strings.Contains(w.Message, "not formatted") {
			return "", errors.New(w.Message)
		}
	}
	var out bytes.Buffer
	if err := json.Indent(&out, config, "", "\t"); err != nil {
		return "", err
	}
	out.WriteByte('\n')
	return out.String(), nil
}

// provision loads a config up to the point before it starts.
func provision(t *testing.T, config string) error {
	t.Helper()
	cfg := new(caddy.Config)
	if err := caddy.StrictUnmarshalJSON([]byte(config), cfg); err != nil {
		return err
	}
	cfg.StorageRaw = json.RawMessage(`{"module":"file_system","root":"` + t.TempDir() + `"}`)
	cfg.Logging = &caddy.Logging{Logs: map[string]*caddy.CustomLog{"default": {BaseLog: caddy.BaseLog{Level: "FATAL"}}}}
	return caddy.Validate(cfg)
}

func fixtures(t *testing.T, kind string) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/adapt/" + kind + "/*.caddyfiletest")
	if err != nil || len(files) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	return files
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
