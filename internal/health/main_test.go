// This file looks for goroutines that outlive the tests, and has what several of
// them need.

package health

import (
	"encoding/base64"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// parse reads health_ws and health_http as they stand in a Caddyfile.
func parse(text string) (*Active, error) {
	a := new(Active)
	d := caddyfile.NewTestDispenser(text)
	for d.Next() {
		var err error
		switch d.Val() {
		case "health_ws":
			a.WS = new(WSCheck)
			err = a.WS.UnmarshalCaddyfile(d)
		case "health_http":
			a.HTTP = new(HTTPCheck)
			err = a.HTTP.UnmarshalCaddyfile(d)
		default:
			err = d.Errf("left over: %q", d.Val())
		}
		if err != nil {
			return nil, err
		}
	}
	return a, nil
}

// compiled is the probe of health_ws and health_http as they stand in a Caddyfile.
func compiled(t *testing.T, text string) Probe {
	t.Helper()
	a, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	p, err := a.Compile()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// compare checks that err has a part, or that there is none if want is empty.
func compare(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("got error %v, want none", err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("got error %v, want one with %q", err, want)
	}
}

// validKey reports whether a Sec-WebSocket-Key is 16 bytes in base64.
func validKey(key string) bool {
	raw, err := base64.StdEncoding.DecodeString(key)
	return err == nil && len(raw) == 16
}
