// This file tests the blocks of a Caddyfile, good and bad.

package health

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func TestCaddyfileGood(t *testing.T) {
	for _, test := range []struct{ name, text, want string }{
		{"bare", "health_ws", `{"ws":{}}`},
		{"bare http", "health_http", `{"http":{}}`},
		{"URI", "health_ws /chat?x=1", `{"ws":{"uri":"/chat?x=1"}}`},
		{"empty block", "health_ws {\n}", `{"ws":{}}`},
		{"URI and block", "health_ws / {\nport 81\n}", `{"ws":{"uri":"/","port":81}}`},
		{"both", "health_ws {\nport 1\n}\nhealth_http /x {\nport 65535\n}", `{"ws":{"port":1},"http":{"uri":"/x","port":65535}}`},
		{
			"everything", `health_http /ready {
				port 8081
				header Host example.com
				header X-A 1
				header x-a ""
				method HEAD
				expect_status 200 204-206 3xx
				expect_header X-There
				expect_header X-Gone ""
				expect_header X-Is yes
				expect_header X-Is ~^v\d
			}`,
			`{"http":{"uri":"/ready","port":8081,"headers":{"Host":["example.com"],"X-A":["1",""]},` +
				`"expect_status":["200","204-206","3xx"],"expect_headers":[{"field":"X-There"},{"field":"X-Gone","value":""},` +
				`{"field":"X-Is","value":"yes"},{"field":"X-Is","pattern":"^v\\d"}],"method":"HEAD"}}`,
		},
		{"body", "health_http {\nexpect_body \"^ok$\"\n}", `{"http":{"expect_body":"^ok$"}}`},
		{"placeholder in a header", "health_ws {\nheader Authorization \"Bearer {env.TOKEN}\"\n}", `{"ws":{"headers":{"Authorization":["Bearer {env.TOKEN}"]}}}`},
		{"placeholder as a host", "health_ws {\nheader Host {env.NAME}\n}", `{"ws":{"headers":{"Host":["{env.NAME}"]}}}`},
		{"subprotocol", "health_ws {\nheader Sec-WebSocket-Protocol chat\n}", `{"ws":{"headers":{"Sec-Websocket-Protocol":["chat"]}}}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, err := parse(test.text)
			if err != nil {
				t.Fatal(err)
			}
			if got, _ := json.Marshal(a); string(got) != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
			// What was said in JSON is what was said.
			back := new(Active)
			decoder := json.NewDecoder(strings.NewReader(test.want))
			decoder.DisallowUnknownFields()
			if err := decoder.Decode(back); err != nil {
				t.Fatal(err)
			}
			if err := back.Check(); err != nil {
				t.Error(err)
			}
			if got, _ := json.Marshal(back); string(got) != test.want {
				t.Errorf("from JSON: got %s, want %s", got, test.want)
			}
		})
	}
}

func TestCaddyfileBad(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"health_ws / /", `health_ws: URI: surplus argument "/"`},
		{`health_ws ""`, `health_ws: URI: invalid value ""`},
		{"health_ws chat", `health_ws: invalid URI "chat": it must begin with /`},
		{"health_ws http://x/", `health_ws: invalid URI "http://x/": it must begin with /`},
		{`health_ws "/a b"`, `health_ws: invalid URI "/a b": there can be no space`},
		{"health_ws /a#b", `health_ws: invalid URI "/a#b"`},
		{"health_ws /%zz", `health_ws: invalid URI "/%zz": invalid URL escape "%zz"`},
		{"health_ws {\nmethod GET\n}", `health_ws: unrecognized subdirective "method"`},
		{"health_ws {\nexpect_body x\n}", `health_ws: unrecognized subdirective "expect_body"`},
		{"health_http {\nuri /\n}", `health_http: unrecognized subdirective "uri"`},
		{"health_ws {\n{\nport 1\n}\n}", `surplus block`},
		{"health_ws {\nport 1 {\nx\n}\n}", `health_ws: port: surplus block`},

		{"health_ws {\nport\n}", `health_ws: port: missing argument`},
		{"health_ws {\nport 1 2\n}", `health_ws: port: surplus argument "2"`},
		{"health_ws {\nport 1\nport 1\n}", `health_ws: port: repeated`},
		{"health_ws {\nport http\n}", `health_ws: port: invalid number "http"`},
		{"health_ws {\nport \"\"\n}", `health_ws: port: invalid number ""`},
		{"health_ws {\nport 0\n}", `health_ws: port: invalid port "0"`},
		{"health_ws {\nport 65536\n}", `health_ws: port: invalid port "65536"`},
		{"health_ws {\nport -1\n}", `health_ws: port: invalid port "-1"`},
		{"health_ws {\nport 80-81\n}", `health_ws: port: invalid number "80-81"`},

		{"health_ws {\nheader X\n}", `health_ws: header: missing argument`},
		{"health_ws {\nheader X 1 2\n}", `health_ws: header: surplus argument "2"`},
		{"health_ws {\nheader \"X Y\" 1\n}", `health_ws: header: invalid field "X Y"`},
		{"health_ws {\nheader X \"a\nb\"\n}", `health_ws: header: invalid value "a\nb" of "X"`},
		{"health_ws {\nheader Host \"\"\n}", `health_ws: header: invalid value "" of "Host"`},
		{"health_ws {\nheader Host \"a b\"\n}", `health_ws: header: invalid value "a b" of "Host"`},
		{"health_ws {\nheader Host a\nheader host b\n}", `health_ws: header: more than one Host: ["a" "b"]`},
		{"health_ws {\nheader sec-websocket-key x\n}", `health_ws: header: "Sec-Websocket-Key" is up to the check`},
		{"health_http {\nheader Upgrade websocket\n}", `health_http: header: "Upgrade" is up to the check`},
		{"health_http {\nheader Content-Length 5\n}", `health_http: header: "Content-Length" is up to the check`},

		{"health_ws {\nexpect_status\n}", `health_ws: expect_status: missing argument`},
		{"health_ws {\nexpect_status 101 2xy\n}", `health_ws: expect_status: invalid status "2xy"`},
		{"health_ws {\nexpect_status \"\"\n}", `health_ws: expect_status: invalid status ""`},
		{"health_ws {\nexpect_status 101\nexpect_status 2xx\n}", `health_ws: expect_status: repeated`},

		{"health_ws {\nexpect_header\n}", `health_ws: expect_header: missing argument`},
		{"health_ws {\nexpect_header X a b\n}", `health_ws: expect_header: surplus argument "b"`},
		{"health_ws {\nexpect_header \"\"\n}", `health_ws: expect_header: invalid field ""`},
		{"health_ws {\nexpect_header X: a\n}", `health_ws: expect_header: invalid field "X:"`},
		{"health_ws {\nexpect_header X ~\n}", `health_ws: expect_header: invalid regexp ""`},
		{"health_ws {\nexpect_header X ~(\n}", `health_ws: expect_header: invalid regexp "("`},

		{"health_http {\nmethod\n}", `health_http: method: missing argument`},
		{"health_http {\nmethod GET POST\n}", `health_http: method: surplus argument "POST"`},
		{"health_http {\nmethod GET\nmethod GET\n}", `health_http: method: repeated`},
		{"health_http {\nmethod \"\"\n}", `health_http: method: invalid value ""`},
		{"health_http {\nmethod \"G T\"\n}", `health_http: method: invalid method "G T"`},
		{"health_http {\nmethod CONNECT\n}", `health_http: method: invalid method "CONNECT"`},
		{"health_http {\nexpect_body\n}", `health_http: expect_body: missing argument`},
		{"health_http {\nexpect_body a b\n}", `health_http: expect_body: surplus argument "b"`},
		{"health_http {\nexpect_body \"\"\n}", `health_http: expect_body: invalid value ""`},
		{"health_http {\nexpect_body [\n}", `health_http: expect_body: invalid regexp "["`},
		{"health_http {\nexpect_body a\nexpect_body a\n}", `health_http: expect_body: repeated`},
		{"health_http {\nmethod HEAD\nexpect_body ok\n}", `health_http: expect_body: "ok" cannot match`},
	} {
		t.Run(test.text, func(t *testing.T) {
			_, err := parse(test.text)
			compare(t, err, test.want)
			if err != nil && !strings.Contains(err.Error(), ", at Testfile:") {
				t.Errorf("got %v, want the line", err)
			}
		})
	}
}

// A check takes its own block and nothing else: what follows, and the end of the
// block that it stands in, are left.
func TestCaddyfileInsideABlock(t *testing.T) {
	d := caddyfile.NewTestDispenser("proxy {\nbefore\nhealth_ws /x {\nport 81\n}\nhealth_http\nhealth_http /y\nafter\n}\nbeyond")
	d.Next()
	var got []string
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		got = append(got, d.Val())
		var err error
		switch d.Val() {
		case "health_ws":
			err = new(WSCheck).UnmarshalCaddyfile(d)
		case "health_http":
			err = new(HTTPCheck).UnmarshalCaddyfile(d)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got, want := strings.Join(got, " "), "before health_ws health_http health_http after"; got != want {
		t.Errorf("got subdirectives %q, want %q", got, want)
	}
	if !d.Next() || d.Val() != "beyond" {
		t.Errorf("after the block: got %q", d.Val())
	}
}

func FuzzCaddyfile(f *testing.F) {
	f.Add("health_ws /x {\nport 81\nheader A b\nexpect_header X ~y\nexpect_status 101 2xx\n}")
	f.Add("health_http {\nmethod HEAD\nexpect_body x {\n}")
	f.Add("health_http {\n{\n}\nhealth_ws }")
	f.Fuzz(func(t *testing.T, text string) {
		a, err := parse(text)
		if err != nil || a.WS == nil && a.HTTP == nil {
			return
		}
		if err := a.Check(); err != nil {
			t.Errorf("got %v of what was accepted", err)
		}
	})
}
