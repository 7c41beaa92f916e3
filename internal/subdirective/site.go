package subdirective

import (
	"reflect"

	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
)

// Site returns the first address of the site that a directive stands in. Caddy
// keeps it in an unexported field of the helper, where reflection may read it, but
// nothing else may; a test says when that has changed.
func Site(helper httpcaddyfile.Helper) string {
	if block := reflect.ValueOf(helper).FieldByName("parentBlock"); block.Kind() == reflect.Struct {
		if keys := block.FieldByName("Keys"); keys.Kind() == reflect.Slice && keys.Len() > 0 {
			if text := keys.Index(0).FieldByName("Text"); text.Kind() == reflect.String && text.String() != "" {
				return text.String()
			}
		}
	}
	return "site"
}
